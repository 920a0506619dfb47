"""sft.start continues an earlier fine-tuning, with the same or with another training method."""

import math
from pathlib import Path

import pytest
import torch
from conftest import ONE_LAYER, SHORT, linked, run_program

from pipeline.models import references
from pipeline.models.weights import Weights
from pipeline.runs import artifacts
from pipeline.runs.artifacts import Kind
from pipeline.runs.records import TrainingRecord

STILL = ("sft.learning_rate=1e-30", "sft.max_steps=1", "sft.eval_steps=1", "sft.save_steps=1")
"""A learning rate that changes no weight."""
STEPS = ("sft.max_steps=2", "sft.eval_steps=2", "sft.save_steps=2")


def go_on(run_dir: Path, start: Path, *settings: str, stage: str = "sft") -> int:
    """Continue the `sft` of the run `start` in `run_dir`, and return the exit status."""
    linked(run_dir, start, "source", "upcast", "data")
    return run_program(f"stage={stage}", f"run_dir={run_dir}", f"sft.start={start}/sft", *settings)


def trained(run_dir: Path) -> TrainingRecord:
    return artifacts.load(run_dir / "sft").read(TrainingRecord)


def weights_of(run_dir: Path) -> Weights:
    return Weights(references.of_artifact(artifacts.load(run_dir / "sft")))


METHODS = {
    "full after full": ("smoke", "full", Kind.checkpoint),
    "lora after full": ("smoke", "lora", Kind.adapter),
    "full after lora": ("lora", "full", Kind.checkpoint),
    "lora after lora": ("lora", "lora", Kind.adapter),
}


@pytest.mark.parametrize("case", METHODS)
def test_training_continues_from_the_weights_of_the_start(
    case: str, smoke_run: Path, lora_run: Path, tmp_path: Path
) -> None:
    of, method, kind = METHODS[case]
    start = {"smoke": smoke_run, "lora": lora_run}[of]
    settings = ("recipe=smoke", f"train@sft={method}", "sft.precision=fp32", *SHORT, *ONE_LAYER)
    assert go_on(tmp_path / "still", start, *settings, *STILL) == 0
    before, after = weights_of(start), weights_of(tmp_path / "still")
    assert all(torch.equal(before.read_trained(name), after.read_trained(name)) for name in before.names())
    assert go_on(tmp_path / "more", start, *settings, *STEPS) == 0
    more = artifacts.load(tmp_path / "more" / "sft")
    assert more.kind is kind and more.parents["start"] == artifacts.load(start / "sft").fingerprint
    assert math.isclose(trained(tmp_path / "more").validation_loss_before, trained(start).validation_loss, rel_tol=1e-3)
    assert trained(tmp_path / "more").validation_loss < trained(start).validation_loss


BASIC = ("recipe=smoke", *SHORT)
MISTAKES = {
    "missing": ("{run}/nothing", (), "not a complete stage. Give the directory of a complete sft stage"),
    "other stage": ("{run}/quantize", (), "was made by stage=quantize. Give the directory of an sft stage."),
    "other base": ("{run}/sft", ("model.tiny.seed=1",), "was made from another checkpoint than"),
    "parts": ("{run}/sft", ("train@sft=bf16_parts", "upcast.experts=bf16"), "the experts of sft.start="),
    "other adapters": ("{lora}/sft", ("train@sft=lora",), "sft.lora.layers=None, but [1] there. Use the same values."),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_start_that_cannot_be_continued_is_refused(
    mistake: str, smoke_run: Path, lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, settings, message = MISTAKES[mistake]
    of = lora_run if "{lora}" in start else smoke_run
    run_dir = tmp_path / "run" if mistake == "other base" else linked(tmp_path / "run", of, "source", "upcast", "data")
    start = start.format(run=smoke_run, lora=lora_run)
    if mistake == "other base":
        assert run_program("stage=upcast", f"run_dir={run_dir}", *BASIC, *settings) == 0
    assert run_program("stage=sft", f"run_dir={run_dir}", f"sft.start={start}", *BASIC, *settings) == 2
    assert f"sft.start={start}" in (error := capsys.readouterr().err) and message in error


def test_a_stage_cannot_continue_from_its_own_directory(smoke_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ("stage=sft", f"run_dir={smoke_run}", f"sft.start={smoke_run}/sft", "overwrite=true")
    assert run_program(*line, *BASIC) == 2
    assert "this is the directory that stage=sft writes" in capsys.readouterr().err
    assert artifacts.load(smoke_run / "sft").kind is Kind.checkpoint
