"""Packed training has the same tokens, loss and gradient as training on padded examples."""

from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT, linked, run_program

from pipeline.runs import artifacts
from pipeline.runs.metrics import read_metrics

# One step over all training examples, so that packed and padded training see the same documents.
ALL_AT_ONCE = (*SHORT, "data.max_samples=20", "data.max_length=200")


def train_one_step(run_dir: Path, source: Path, stage: str, *settings: str) -> dict[str, Any]:
    """Train one step, and return its metrics together with the metrics of the validation before it."""
    linked(run_dir, source, *(("upcast", "sft", "quantize") if stage == "qat" else ("upcast",)))
    once = (f"{stage}.max_steps=1", f"{stage}.logging_steps=1", f"{stage}.batch_size=64")
    assert run_program(f"stage={stage}", "recipe=smoke", f"run_dir={run_dir}", *ALL_AT_ONCE, *once, *settings) == 0
    validation, step, *_ = read_metrics(run_dir / stage)
    return {**validation, **step}


@pytest.mark.parametrize(("stage", "settings"), [("sft", ()), ("qat", ()), ("qat", ("qat.distillation.weight=0.5",))])
def test_packing_changes_neither_loss_nor_gradient_nor_token_counts(
    stage: str, settings: tuple[str, ...], smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    padded = train_one_step(tmp_path / "padded", smoke_run, stage, *settings)
    capsys.readouterr()
    packed = train_one_step(tmp_path / "packed", smoke_run, stage, f"{stage}.packing=true", *settings)
    output = capsys.readouterr()
    assert "keeps packed documents apart" in output.out and "rows of up to 200 tokens" in output.out
    assert "examples/s" not in output.err
    counts = ("tokens", "supervised_tokens")
    assert [packed[key] for key in counts] == [padded[key] for key in counts]
    figures = ["loss", "grad_norm", "eval_loss", *(["teacher_divergence"] if "teacher_divergence" in padded else [])]
    assert {key: packed[key] for key in figures} == pytest.approx({key: padded[key] for key in figures}, rel=1e-5)


def test_packed_rows_hold_whole_examples_and_at_most_max_length_tokens(smoke_run: Path, tmp_path: Path, capsys) -> None:
    run_dir = tmp_path / "run"
    train_one_step(run_dir, smoke_run, "sft", "sft.packing=true", "sft.max_steps=3", "sft.batch_size=1")
    counted = [line["tokens"] for line in read_metrics(run_dir / "sft") if "tokens" in line]
    assert len(counted) == 3 and max(counted) <= 200
    assert artifacts.load(run_dir / "sft").details["steps"] == 3
