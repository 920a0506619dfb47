"""QAT with distillation lowers the divergence from the SFT model."""

from pathlib import Path

import pytest
from conftest import ONE_LAYER, SHORT, linked, run_program

from pipeline.runs.metrics import read_metrics

SETTINGS = (*SHORT, "qat.max_steps=16", "qat.logging_steps=4", "qat.eval_steps=100", "qat.save_steps=100")


def distill(run_dir: Path, source: Path, recipe: str, *settings: str) -> list[float]:
    """Run QAT, and return the divergence from the teacher at each logged step, in nats per token."""
    linked(run_dir, source, "upcast", "sft", "quantize")
    assert run_program("stage=qat", f"recipe={recipe}", f"run_dir={run_dir}", *SETTINGS, *settings) == 0
    return [line["teacher_divergence"] for line in read_metrics(run_dir / "qat") if "teacher_divergence" in line]


@pytest.mark.parametrize("recipe", ["smoke", "smoke_lora"])
def test_distillation_lowers_the_divergence_from_the_teacher(
    recipe: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue("smoke_run" if recipe == "smoke" else "lora_run")
    layers = ONE_LAYER if recipe == "smoke_lora" else ()
    found = distill(tmp_path / "run", run, recipe, "qat.distillation.weight=1", *layers)
    assert len(found) == 4 and found[-1] < 0.9 * found[0]


def test_without_a_weight_there_is_no_teacher(smoke_run: Path, tmp_path: Path) -> None:
    assert distill(tmp_path / "run", smoke_run, "smoke") == []


def test_a_weight_above_one_and_a_router_loss_with_distillation_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("qat.distillation.weight=1.5", "qat.router_aux_loss_coef=0.01")
    assert run_program("stage=qat", "recipe=smoke", f"run_dir={tmp_path}", *settings) == 2
    error = capsys.readouterr().err
    assert "qat.distillation.weight=1.5: must be from 0 to 1." in error
    assert "qat.router_aux_loss_coef=0.01: cannot be combined with qat.distillation.weight" in error
