"""stage=all and the training stages find, before they work, what a later stage would refuse."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import evaluated
import pytest
from conftest import run_program

from pipeline.config import ModelConfig, PipelineConfig, QuantizeSource, Stage
from pipeline.doctor import ahead
from pipeline.errors import UserError
from pipeline.evaluate import measure
from pipeline.runs.artifacts import ARTIFACT_FILE
from pipeline.runs.run import Run

Complaints = Callable[..., str]


@pytest.fixture
def complaints(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Complaints:
    """Return a function that runs stage=all with wrong settings, and returns the error. No stage may have begun."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "WANDB_MODE", "NO_SUCH_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    def run(*settings: str) -> str:
        assert run_program("stage=all", "recipe=smoke_lora", f"run_dir={tmp_path / 'run'}", *settings) == 2
        assert not any((tmp_path / "run" / stage.name).exists() for stage in Stage)
        return capsys.readouterr().err

    return run


def test_mistakes_of_many_stages_are_reported_together(complaints: Complaints) -> None:
    error = complaints(
        "qat.optimizer=adamw_hff",
        "qat.attn_implementation=sdpa",
        "qat.lora.layers=[7]",
        "sft.lora.layers=[7]",
        "tracking=wandb",
        "evaluate.generate=true",
        "evaluate.prompts.path=no_such_file.jsonl",
        "evaluate.group_column=topic",
        "evaluate.judge.url=http://localhost:9/v1",
        "evaluate.judge.api_key_env=NO_SUCH_KEY",
        "evaluate.source=banana",
        "export.source=verify",
        "export.push_to_hub=me/mine",
        "verify.engines=[llama_cpp]",
        "verify.python.llama_cpp=/no/such/python",
        "verify.reference=/no/such/model",
    )
    for part in (
        "qat.optimizer=adamw_hff: transformers has no such optimizer. Did you mean 'adamw_torch'",
        "qat.attn_implementation=sdpa: transformers cannot train gpt-oss with this attention here",
        "sft.lora.layers=[7]: the model has the layers 0 to 1.",
        "qat.lora.layers=[7]: the model has the layers 0 to 1.",
        "tracking=wandb: W&B could not be started (no login)",
        "evaluate.prompts.path=no_such_file.jsonl: no such file or folder.",
        "topic",
        "evaluate.judge.api_key_env=NO_SUCH_KEY: this environment variable is not set",
        "evaluate.source=banana: neither a stage",
        "export.source=verify: must be one of upcast, sft, quantize, qat, or a directory.",
        "export.push_to_hub=me/mine: there is no token for the Hub.",
        "verify.engines=llama_cpp: loads gguf, not mxfp4.",
        "verify.python.llama_cpp=/no/such/python: no such program.",
        "verify.reference=/no/such/model: no such directory.",
    ):
        assert part in error, part


def test_a_column_that_prompts_need_is_missed_before_training(complaints: Complaints, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "2+3?"}]}\n')
    settings = ("evaluate.generate=true", f"evaluate.prompts.path={path}", "+evaluate.prompts.expected.safety=kind")
    assert "kind" in complaints(*settings)


def test_a_missing_package_of_an_optimizer_is_named_before_training(complaints: Complaints) -> None:
    assert "sft.optimizer=adamw_bnb_8bit: You need to install `bitsandbytes`" in complaints(
        "sft.optimizer=adamw_bnb_8bit"
    )


def config_of(run_dir: Path, stage: Stage = Stage.all) -> PipelineConfig:
    config = PipelineConfig(stage, run_dir=str(run_dir), model=ModelConfig("/no/such/model"))
    wrong = {name: replace(getattr(config, name), optimizer="no_such") for name in ("sft", "qat")}
    return replace(config, **wrong)


def complete(run_dir: Path, *stages: Stage) -> None:
    for stage in stages:
        (run_dir / stage.name).mkdir(parents=True)
        (run_dir / stage.name / ARTIFACT_FILE).touch()


def about(problems: list[str], key: str) -> list[str]:
    return [problem for problem in problems if problem.startswith(key)]


def test_complete_stages_are_not_checked(tmp_path: Path) -> None:
    complete(tmp_path, Stage.sft)
    found = ahead.problems(config_of(tmp_path), is_launched_well=False)
    assert about(found, "qat.optimizer") and not about(found, "sft.optimizer")
    complete(tmp_path, Stage.qat)
    assert ahead.problems(config_of(tmp_path), is_launched_well=False) == []
    again = replace(config_of(tmp_path), overwrite=True)
    assert about(ahead.problems(again, is_launched_well=False), "sft.optimizer")
    named = ahead.problems(replace(again, overwrite="qat,export"), is_launched_well=False)
    assert about(named, "qat.optimizer") and not about(named, "sft.optimizer")
    assert ahead.problems(replace(again, overwrite="export,verify"), is_launched_well=False) == []


def test_the_stages_after_complete_training_are_checked(tmp_path: Path) -> None:
    complete(tmp_path, Stage.sft, Stage.qat)
    config = config_of(tmp_path)
    wrong = replace(
        config,
        evaluate=replace(config.evaluate, source="banana"),
        verify=replace(config.verify, reference="/no/such/model"),
        compare=replace(config.compare, runs=[str(tmp_path / "none")]),
        data=replace(config.data, path="/no/such/rows.jsonl"),
    )
    found = ahead.problems(wrong)
    for key in ("evaluate.source=banana", "verify.reference=/no/such/model", "compare.runs", "/no/such/rows.jsonl"):
        assert any(key in problem for problem in found), key
    assert about(ahead.problems(replace(config, controls=True)), "qat.optimizer")


def test_runs_to_compare_must_be_there_and_evaluated_except_this_run(tmp_path: Path) -> None:
    def problems(*runs: str) -> list[str]:
        config = config_of(tmp_path / "runs" / "this")
        patterns = [str(tmp_path / "runs" / name) for name in runs]
        found = ahead.problems(replace(config, compare=replace(config.compare, runs=patterns)), is_launched_well=False)
        return about(found, "compare.runs")

    assert not problems() and not problems("this") and not problems("*") and not problems("this/evaluate")
    assert len(problems("this", "none")) == 1 and "no directory matches" in problems("none")[0]
    complete(tmp_path / "runs" / "other", Stage.sft)
    assert "the run was not evaluated" in problems("*")[0]
    complete(tmp_path / "runs" / "other", Stage.evaluate)
    complete(tmp_path / "runs" / "this", Stage.sft)
    assert not problems("*") and not problems("this", "other")


class NoData:
    """A suite whose data cannot be reached."""

    def check_data(self) -> None:
        raise UserError("evaluate.lm_eval.tasks=['arc']: lm-eval cannot run them (no connection).")


def test_the_data_of_task_suites_are_missed_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    evaluate = replace(config.evaluate, lm_eval=replace(config.evaluate.lm_eval, tasks=["arc"]))
    monkeypatch.setattr(measure, "check_inputs", lambda *_: ([], [], NoData()))
    found = ahead.problems(replace(config, evaluate=evaluate))
    assert about(found, "evaluate.lm_eval.tasks")


def test_the_data_of_task_suites_are_not_needed_after_they_were_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(tmp_path, Stage.sft, Stage.qat)
    config = config_of(tmp_path)
    evaluate = replace(config.evaluate, lm_eval=replace(config.evaluate.lm_eval, tasks=["arc"]))
    config = replace(config, evaluate=evaluate)
    monkeypatch.setattr(measure, "check_inputs", lambda *_: ([], [], NoData()))
    evaluated.record(tmp_path / "evaluate", settings=Run(config).settings(["evaluate.lm_eval"]))
    assert not ahead.problems(config)
    evaluated.record(tmp_path / "evaluate", settings={"evaluate.lm_eval.tasks": ["other"]})
    assert about(ahead.problems(config), "evaluate.lm_eval.tasks")


def test_stages_that_all_skips_are_not_checked(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    skipping = replace(config, quantize=replace(config.quantize, source=QuantizeSource.upcast))
    assert not about(ahead.problems(skipping, is_launched_well=False), "sft.optimizer")


def test_a_stage_alone_is_checked_once_its_input_is_there(tmp_path: Path) -> None:
    assert ahead.problems(config_of(tmp_path, Stage.qat)) == []
    complete(tmp_path, Stage.quantize)
    found = ahead.problems(config_of(tmp_path, Stage.qat))
    assert about(found, "qat.optimizer") and about(found, "model.path=/no/such/model")
    assert not about(found, "sft")


def test_stages_that_do_not_train_check_themselves(tmp_path: Path) -> None:
    for stage in (Stage.doctor, Stage.export, Stage.evaluate, Stage.publish):
        assert ahead.problems(config_of(tmp_path, stage)) == []
