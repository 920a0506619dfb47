"""QAT that holds oscillating weights resumes to the same bytes, and counting them does not change training."""

from pathlib import Path

import pytest
from conftest import SHORT, linked, outcomes, run_program
from test_resume import make_interruption

from pipeline.runs import artifacts
from pipeline.runs.metrics import read_metrics
from pipeline.training import callbacks, oscillation

BEFORE = ("upcast", "sft", "quantize")
# At this rate, many codes flip in every step.
FAST = ("recipe=smoke", *SHORT, "qat.learning_rate=1e-2", "qat.lr_scheduler=constant", "qat.max_steps=9")
THREE, NINE = ((f"qat.eval_steps={steps}", f"qat.save_steps={steps}", "qat.keep_best=false") for steps in (3, 9))
HOLD = (*FAST, "qat.oscillation=hold", "qat.keep_best=false")


def figures(qat: Path, name: str) -> list[float]:
    return [line[f"eval_{name}"] for line in read_metrics(qat) if f"eval_{name}" in line]


def test_qat_that_holds_weights_resumes_to_the_same_bytes_and_its_export_is_proved(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = (f"run_dir={linked(tmp_path / name, smoke_run, *BEFORE)}" for name in ("whole", "cut"))
    assert run_program("stage=qat", *HOLD, *THREE, whole) == 0
    held = figures(tmp_path / "whole" / "qat", "held_weights")
    assert held[0] == 0 and 0 < held[1] < held[-1]
    assert (
        f"[qat] qat.oscillation=hold held {held[-1]:.2%} of the experts' weights at the last step"
        in capsys.readouterr().out
    )

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.Checkpoints, "on_save", make_interruption(6))
        assert run_program("stage=qat", *HOLD, *THREE, cut) == 130
    assert run_program("stage=qat", *HOLD, *THREE, cut) == 0
    one, other = (artifacts.load(tmp_path / name / "qat") for name in ("whole", "cut"))
    assert (one.fingerprint, one.details) == (other.fingerprint, other.details)
    for name in ("held_weights", "oscillating_codes", "loss"):
        assert figures(one.directory, name) == figures(other.directory, name)

    for stage in ("export", "verify"):
        assert run_program(f"stage={stage}", *HOLD, *THREE, whole) == 0
    assert "failed" not in outcomes(tmp_path / "whole")


def test_counting_oscillating_codes_does_not_change_training_and_holding_weights_lowers_the_count(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted, bare, held = (
        f"run_dir={linked(tmp_path / name, smoke_run, *BEFORE)}" for name in ("counted", "bare", "held")
    )
    assert run_program("stage=qat", *FAST, *NINE, counted) == 0
    assert "of the sampled 4-bit values went back and forth in the last 9 steps" in capsys.readouterr().out
    assert run_program("stage=qat", *HOLD, *NINE, held) == 0
    with monkeypatch.context() as patched:
        patched.setattr(oscillation, "watch", lambda *_: [])
        assert run_program("stage=qat", *FAST, *NINE, bare) == 0
    one, other = (artifacts.load(tmp_path / name / "qat") for name in ("counted", "bare"))
    assert one.fingerprint == other.fingerprint
    shares = [figures(tmp_path / name / "qat", "oscillating_codes")[-1] for name in ("counted", "held")]
    assert 0 < shares[1] < shares[0]
    assert figures(other.directory, "oscillating_codes") == []
