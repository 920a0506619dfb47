"""A run that knows itself, from the first stage to the report, with an interruption and a rebuild."""

import json
from pathlib import Path

import pytest
from conftest import SHORT, run_program

from pipeline.runs import artifacts
from pipeline.training import callbacks

ANSWERS = ("eval=quick", "evaluate.prompts.max_samples=2", "evaluate.generation.max_new_tokens=2")


def interrupt(self, args, state, control, **_) -> None:
    if state.global_step == 3:
        raise KeyboardInterrupt


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert run_program(*arguments) == 2
    return capsys.readouterr().err.rpartition("error: ")[2].rstrip("\n")


def test_a_run_needs_no_recipe_after_its_first_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = f"run_dir={tmp_path}"
    assert run_program("stage=upcast", "recipe=smoke", run_dir, *SHORT, *ANSWERS) == 0
    for stage in ("sft", "quantize"):
        assert run_program(f"stage={stage}", run_dir) == 0
    with monkeypatch.context() as patched:
        patched.setattr(callbacks.Metrics, "on_pre_optimizer_step", interrupt, raising=False)
        assert run_program("stage=qat", run_dir) == 130
    assert capsys.readouterr().err.endswith(
        "error: interrupted. stage=qat: the next run starts from step 3, its last checkpoint. To go on:"
        f" python -m pipeline stage=qat {run_dir}\n"
    )
    assert error_of(capsys, "stage=export", run_dir) == (
        f"{tmp_path}/qat is unfinished, so export.source is not clear. Finish qat: python -m pipeline stage=qat"
        f" {run_dir}. Or take the newest complete model: python -m pipeline stage=export {run_dir}"
        " export.source=quantize"
    )
    assert run_program("stage=all", run_dir) == 0
    assert artifacts.load(tmp_path / "export").details["exported_from"] == "qat"
    _answers_are_kept(tmp_path, capsys)
    _nothing_is_discarded_that_is_not_named(tmp_path, capsys)


def _answers_are_kept(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = artifacts.load(run / "evaluate")
    assert before.settings["evaluate.generate"]
    assert run_program("stage=all", "recipe=smoke", f"run_dir={run}", *SHORT) == 0
    assert (
        "up to date: doctor, upcast, sft, quantize, qat, export, verify, evaluate, compare" in capsys.readouterr().out
    )
    assert artifacts.load(run / "evaluate") == before
    assert "eval=quick" in (run / "command.yaml").read_text()


def _nothing_is_discarded_that_is_not_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {stage: (run / stage / "artifact.json").stat().st_mtime_ns for stage in ("sft", "quantize", "qat", "export")}
    for overwrite in ("true", "qat"):
        assert "export" in error_of(capsys, "stage=all", f"run_dir={run}", f"overwrite={overwrite}")
    assert {stage: (run / stage / "artifact.json").stat().st_mtime_ns for stage in made} == made
    rate = json.loads((run / "qat" / "artifact.json").read_text())["settings"]["qat.learning_rate"]
    arguments = ("stage=all", f"run_dir={run}", f"qat.learning_rate={rate / 2}", "overwrite=qat,export")
    assert run_program(*arguments) == 0
    after = {stage: (run / stage / "artifact.json").stat().st_mtime_ns for stage in made}
    assert [stage for stage in made if after[stage] != made[stage]] == ["qat", "export"]
    assert artifacts.load(run / "qat").settings["qat.learning_rate"] == rate / 2
    assert run_program("stage=export", f"run_dir={run}") == 0
    assert "[export] up to date" in capsys.readouterr().out
