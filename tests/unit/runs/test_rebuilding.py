"""`stage=all` with `overwrite`: nothing is discarded that the user has not named."""

import json
from pathlib import Path

import pytest
from evaluated import record, record_export

from pipeline.config import PipelineConfig, Stage
from pipeline.errors import UserError
from pipeline.runs import rebuilding
from pipeline.stages.all import STAGES

PARENTS = {"upcast": {"source": "s"}, "sft": {"upcast": ""}, "quantize": {"sft": ""}, "qat": {"quantize": ""}}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run in which all models are complete. The training took hours."""
    for name, parents in PARENTS.items():
        record(tmp_path / name, parents=parents, seconds=15_000.0 if name == "sft" else 300.0)
    record_export(tmp_path, details={"exported_from": "qat"}, seconds=0.2)
    record(tmp_path / "evaluate", kind="report")
    return tmp_path


def error_of(run_dir: Path, overwrite: bool | str, stages: tuple[Stage, ...] = STAGES) -> str:
    with pytest.raises(UserError) as caught:
        rebuilding.check(PipelineConfig(stage=Stage.all, run_dir=str(run_dir), overwrite=overwrite), stages)
    return str(caught.value)


def accept(run_dir: Path, overwrite: bool | str, stages: tuple[Stage, ...] = STAGES) -> None:
    rebuilding.check(PipelineConfig(stage=Stage.all, run_dir=str(run_dir), overwrite=overwrite), stages)


def test_true_lists_what_would_be_discarded_with_the_time_it_took(run_dir: Path) -> None:
    assert error_of(run_dir, True) == (
        "stage=all overwrite=true: would discard upcast (5 min), sft (4.2 h), quantize (5 min), qat (5 min), export"
        f" (below 1 s), evaluate (10 s) in {run_dir}. Name the stages to rebuild: overwrite=<stage>[,<stage>]. To"
        " rebuild all of them: overwrite=upcast,sft,quantize,qat,export,evaluate"
    )


def test_true_is_accepted_if_there_is_nothing_to_discard(tmp_path: Path) -> None:
    accept(tmp_path / "new", True)


def test_stages_that_are_made_from_a_named_one_must_be_named_too(run_dir: Path) -> None:
    assert error_of(run_dir, "sft,qat") == (
        f"overwrite=sft,qat: quantize (5 min), export (below 1 s) in {run_dir} would not fit the rebuilt sft, qat. Name"
        " these stages, too: overwrite=sft,quantize,qat,export. Or use another run_dir to keep them."
    )
    accept(run_dir, "sft,quantize,qat,export")


def test_reports_bring_themselves_up_to_date_and_are_not_asked_for(run_dir: Path) -> None:
    accept(run_dir, "export")
    accept(run_dir, "evaluate")
    accept(run_dir, False)


def test_an_export_of_an_earlier_model_is_not_asked_for(run_dir: Path) -> None:
    record_export(run_dir, details={"exported_from": "quantize"})
    accept(run_dir, "qat")
    assert "quantize,qat,export" in error_of(run_dir, "quantize")


def test_an_unfinished_training_counts(run_dir: Path) -> None:
    (run_dir / "qat" / "artifact.json").unlink()
    (run_dir / "qat" / "checkpoints").mkdir()
    (run_dir / "qat" / "unfinished.json").write_text(
        json.dumps({"settings": {}, "parents": PARENTS["qat"], "data": None})
    )
    assert "qat (unfinished)" in error_of(run_dir, "quantize,export")


@pytest.mark.parametrize("name", ["artifact.json", "unfinished.json"])
def test_a_damaged_record_of_another_stage_is_named(run_dir: Path, name: str) -> None:
    (run_dir / "qat" / "artifact.json").unlink()
    (run_dir / "qat" / "checkpoints").mkdir()
    (run_dir / "qat" / name).write_text('{"parents": ')
    assert f"{run_dir}/qat/{name}: not " in error_of(run_dir, "sft,quantize,export")


def test_controls_count_if_the_command_makes_them(run_dir: Path) -> None:
    record(run_dir / "controls" / "more_sft" / "sft", seconds=3600.0)
    chosen = "sft,quantize,qat,export"
    accept(run_dir, chosen)
    assert "controls (60 min)" in error_of(run_dir, chosen, (*STAGES, Stage.controls))


def test_controls_that_are_all_named_themselves_need_no_further_name(run_dir: Path) -> None:
    stages = (*STAGES, Stage.controls)
    for name in ("more_sft", "stochastic"):
        record(run_dir / "controls" / name / "quantize", seconds=60.0)
    accept(run_dir, "sft,quantize,qat,export,more_sft,stochastic", stages)
    assert "Name these stages, too: overwrite=sft,quantize,qat,export,controls." in error_of(
        run_dir, "sft,quantize,qat,export,more_sft", stages
    )
    accept(run_dir, "more_sft", stages)
    assert "overwrite=quantize,qat,export,more_sft." in error_of(run_dir, "quantize,more_sft", stages)


def test_a_control_that_the_command_does_not_make_is_refused(run_dir: Path) -> None:
    assert error_of(run_dir, "more_sft").endswith("compare. Add controls=true.")
    message = error_of(run_dir, "nearest", (*STAGES, Stage.controls))
    assert message.startswith("overwrite=nearest: this run makes no control nearest. It makes stochastic, ")


def test_stages_of_base_run_and_linked_stages_are_never_discarded(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "sft").symlink_to(run_dir / "sft")
    accept(other, True)


def test_a_stage_that_does_not_run_is_refused(run_dir: Path) -> None:
    message = error_of(run_dir, "publish")
    assert message.startswith("overwrite=publish: this command does not run publish. It runs doctor, upcast, sft")
