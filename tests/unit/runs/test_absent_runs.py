"""A mistyped run_dir is told from a new run, so that no advice leads to a run of the default model."""

from pathlib import Path

import pytest
from conftest import run_program
from evaluated import record

from pipeline import __main__ as program
from pipeline.config import PipelineConfig, Stage
from pipeline.errors import UserError
from pipeline.runs.run import Run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A directory with two runs."""
    for name in ("smoke", "other"):
        record(tmp_path / name / "upcast")
    return tmp_path


def error(run_dir: Path, recipe: str = "default") -> str:
    with pytest.raises(UserError) as caught:
        Run(PipelineConfig(Stage.export, run_dir=str(run_dir), recipe=recipe)).require(Stage.qat)
    return str(caught.value)


def test_a_run_that_is_not_there_is_named_with_the_runs_beside_it(runs: Path) -> None:
    assert error(runs / "smok") == (
        f"run_dir={runs}/smok: no such run (runs beside it: other, smoke). Did you mean 'smoke'? Set run_dir to a run."
        " For a new run, give recipe=<name>."
    )
    assert f"run_dir={runs}: not the directory of a run" in error(runs)
    assert "no such run. Set run_dir" in error(runs / "no" / "where")


def test_a_run_that_is_there_or_is_described_keeps_the_command_to_run_first(runs: Path) -> None:
    assert "Run first: " in error(runs / "smoke")
    assert "Run first: " in error(runs / "new", recipe="smoke")


@pytest.mark.parametrize(
    "arguments",
    [("export",), ("quantize",), ("serve",), ("compare",), ("evaluate", "evaluate.source=all"), ("publish",)],
    ids="-".join,
)
def test_no_stage_advises_to_make_the_default_model_for_a_mistyped_run_dir(
    arguments: tuple[str, ...], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, *more = arguments
    assert run_program(f"stage={stage}", f"run_dir={runs}/smok", *more) == 2
    message = capsys.readouterr().err
    assert f"error: run_dir={runs}/smok: no such run" in message and "stage=upcast" not in message
    assert not (runs / "smok").exists()


def test_a_model_on_the_command_line_describes_a_new_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("stage=quantize", f"run_dir={runs}/new", "model=tiny", "quantize.source=upcast") == 2
    assert "Run first: " in capsys.readouterr().err


@pytest.mark.parametrize(("more", "is_told"), [((), True), (("model=tiny",), False), (("recipe=smoke",), False)])
def test_a_new_run_of_the_default_recipe_is_announced(
    more: tuple[str, ...],
    is_told: bool,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(program, "run_job", lambda *_: None)
    assert run_program("stage=upcast", f"run_dir={runs}/smok", "data=arithmetic", *more) == 0
    announced = f"run_dir={runs}/smok: no such run (runs beside it: other, smoke). Did you mean 'smoke'? A new run"
    assert (announced in capsys.readouterr().err) == is_told
