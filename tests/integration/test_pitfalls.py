"""The program warns of settings that are known to spoil a run."""

from pathlib import Path

import pytest
from conftest import ONE_LAYER, SHORT, linked, run_program

from pipeline.runs import artifacts


def started(run_dir: Path, source: Path, *stages: str) -> tuple[str, ...]:
    linked(run_dir, source, *stages)
    return ("recipe=smoke", f"run_dir={run_dir}", *SHORT, "qat.max_steps=1")


@pytest.mark.parametrize(
    ("setting", "warning", "line"),
    [
        ("qat.learning_rate=1e-2", "is above the learning rate of sft, 0.003", "0.01: 3.3 of the learning rate of sft"),
        ("qat.learning_rate=2e-4", "0.0002 is 0.067 of the learning rate of sft, 0.003", "0.0002: 0.067 of"),
        ("qat.learning_rate=${rate_of_sft:0.1}", None, "0.0003: 0.1 of the learning rate of sft, 0.003"),
        ("sft.learning_rate=1e-3", None, "0.0005: 0.17 of the learning rate of sft, 0.003"),
    ],
)
def test_a_qat_rate_that_does_not_suit_the_rate_that_sft_had_is_warned_of(
    setting: str, warning: str | None, line: str, smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = started(tmp_path / "run", smoke_run, "upcast", "sft", "quantize")
    assert run_program("stage=qat", *settings, setting) == 0
    said = capsys.readouterr()
    assert f"[qat] learning rate {line}" in said.out
    assert (warning is None and "warning: qat.learning_rate" not in said.err) or str(warning) in said.err


def test_rates_of_different_methods_are_converted_before_they_are_compared(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linked(tmp_path / "run", lora_run, "upcast", "sft")
    settings = ("recipe=smoke", "train@sft=lora", *SHORT, *ONE_LAYER, f"run_dir={tmp_path / 'run'}", "qat.max_steps=1")
    assert run_program("stage=quantize", *settings) == 0
    assert run_program("stage=qat", *settings) == 0
    converted = "learning rate of sft, 0.0003 (0.003 with method=lora, converted to full)"
    said = capsys.readouterr()
    assert f"qat.learning_rate=0.0005 is above the {converted}" in said.err
    assert f"[qat] learning rate 0.0005: 1.7 of the {converted}" in said.out


def test_qat_without_sft_is_possible_and_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("recipe=smoke", f"run_dir={tmp_path}", *SHORT, "quantize.source=upcast")
    assert run_program("stage=all", *settings) == 0
    said = capsys.readouterr()
    assert "[sft] skipped, because quantize.source=upcast" in said.out
    assert "nothing has been fine-tuned yet. Published results have QAT after SFT" in said.err
    assert not (tmp_path / "sft").exists()
    assert artifacts.load(tmp_path / "quantize").parents.keys() == {"upcast"}
    assert artifacts.load(tmp_path / "qat").details["steps"] == 6
    assert run_program("stage=quantize", *settings[:-1]) == 2
    assert f"stage=quantize needs {tmp_path / 'sft'}, which is missing" in capsys.readouterr().err


def test_without_sft_there_is_no_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("qat.distillation.weight=0.5", "quantize.source=upcast")
    assert run_program("stage=qat", "recipe=smoke", f"run_dir={tmp_path}", *settings) == 2
    message = (
        "qat.distillation.weight=0.5: the teacher is the SFT model. There is no SFT model if quantize.source=upcast."
    )
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["format=nvfp4_w4a4", "format.importance=true"])
def test_too_little_data_to_calibrate_on_is_refused_with_the_number_needed(
    setting: str, smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = started(tmp_path / "run", smoke_run, "upcast", "sft")
    rule = ("format.scale_rule=mse",) if "importance" in setting else ()
    wanted = "quantize.calibration_samples=100000"
    assert run_program("stage=quantize", *settings, setting, *rule, wanted) == 2
    error = capsys.readouterr().err
    assert wanted in error and "training examples" in error
    assert not (tmp_path / "run" / "quantize" / "artifact.json").exists()


def test_a_format_that_needs_no_calibration_takes_what_data_there_is(smoke_run: Path, tmp_path: Path) -> None:
    settings = started(tmp_path / "run", smoke_run, "upcast", "sft")
    assert run_program("stage=quantize", *settings, "quantize.calibration_samples=100000") == 0
