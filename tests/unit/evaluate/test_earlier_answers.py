"""A command that does not ask for answers keeps those of the earlier report."""

import json
from pathlib import Path

import pytest
from evaluated import record

from pipeline.config import EvaluateConfig, GenerationConfig, PipelineConfig, PromptsConfig, Stage
from pipeline.errors import UserError
from pipeline.evaluate import earlier_answers
from pipeline.runs import commands
from pipeline.runs.commands import Command
from pipeline.runs.run import Run

EARLIER = EvaluateConfig(
    generate=True,
    prompts=PromptsConfig(max_samples=2, expected_of_all={"safety": "safe"}),
    generation=GenerationConfig(max_new_tokens=4, temperature=0.5),
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose report has answers."""
    settings = Run(PipelineConfig(stage=Stage.evaluate, evaluate=EARLIER)).settings(("evaluate",))
    record(tmp_path / "evaluate", kind="report", settings=settings)
    return tmp_path


def kept(run_dir: Path, overwrite: bool = False, **facts: object) -> EvaluateConfig:
    evaluate = EvaluateConfig(batch_size=3, **facts)  # type: ignore[arg-type]
    config = PipelineConfig(stage=Stage.evaluate, run_dir=str(run_dir), evaluate=evaluate, overwrite=overwrite)
    return earlier_answers.keep(config).evaluate


def test_the_settings_of_the_answers_are_kept_and_no_others(run_dir: Path) -> None:
    found = kept(run_dir)
    assert (found.generate, found.prompts, found.generation) == (True, EARLIER.prompts, EARLIER.generation)
    assert found.batch_size == 3


def test_an_unfinished_report_counts_too(run_dir: Path) -> None:
    settings = json.loads((run_dir / "evaluate" / "artifact.json").read_text())["settings"]
    (run_dir / "evaluate" / "artifact.json").unlink()
    (run_dir / "evaluate" / "unfinished.json").write_text(
        json.dumps({"settings": settings, "parents": {}, "data": None})
    )
    assert kept(run_dir).generation == EARLIER.generation


def test_a_setting_that_is_recorded_without_its_secret_is_taken_from_the_configuration(tmp_path: Path) -> None:
    secret = EvaluateConfig(generate=True, prompts=PromptsConfig(path="s3://me:swordfish@host/q.jsonl"))
    settings = Run(PipelineConfig(stage=Stage.evaluate, evaluate=secret)).settings(("evaluate",))
    assert settings["evaluate.prompts.path"] == "s3://***@host/q.jsonl"
    record(tmp_path / "evaluate", kind="report", settings=settings)
    with pytest.raises(UserError, match=r"evaluate\.prompts\.path: .* stands for a secret"):
        kept(tmp_path)
    found = kept(tmp_path, prompts=secret.prompts)
    assert (found.generate, found.prompts) == (True, secret.prompts)


def test_a_command_that_asks_for_answers_has_its_own_settings(run_dir: Path) -> None:
    assert kept(run_dir, generate=True).generation == GenerationConfig()


def test_a_rebuilt_report_has_the_settings_of_the_command(run_dir: Path) -> None:
    assert not kept(run_dir, overwrite=True).generate


@pytest.mark.parametrize("argument", ["eval=none", "evaluate.generate=false"])
def test_a_command_that_names_the_answers_decides(argument: str, run_dir: Path) -> None:
    commands.begin(Command([argument], {}, "evaluate", str(run_dir)))
    assert not kept(run_dir).generate


def test_a_report_without_answers_stays_without(run_dir: Path) -> None:
    record(run_dir / "evaluate", kind="report", settings={"evaluate.generate": False})
    assert not kept(run_dir).generate


def test_settings_that_this_program_does_not_know_are_not_kept(run_dir: Path) -> None:
    record(run_dir / "evaluate", kind="report", settings={"evaluate.generate": True, "evaluate.generation.beams": 4})
    assert not kept(run_dir).generate
