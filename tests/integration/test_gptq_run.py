"""GPTQ in whole runs: QAT, export and verify keep its bits. A killed run resumes, and mistakes are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ONE_LAYER, SHORT, error_of, linked, outcomes, quantized_runs, run_program

from pipeline.checkpoints.gpt_oss import expert_projections
from pipeline.models import references
from pipeline.models.weights import Weights
from pipeline.numerics.codec import same_bits
from pipeline.quantize import codes
from pipeline.runs import artifacts
from pipeline.runs.metrics import read_metrics

GPTQ = "quantize.method=gptq"
FULL = ("recipe=smoke", *SHORT, "qat.max_steps=3", GPTQ)
LORA = ("recipe=smoke_lora", *SHORT, *ONE_LAYER, "qat.max_steps=3", GPTQ)
CASES = {
    "full-mxfp4": FULL,
    "full-nvfp4": (*FULL, "format=nvfp4", "export.target=nvfp4"),
    "lora-mxfp4": LORA,  # the base of this recipe is packed
    "lora-nvfp4": (*LORA, "format=nvfp4", "export.target=nvfp4"),
    "parts-mxfp4": (*FULL, "train@qat=bf16_parts", "quantize.scales=base"),
}


@pytest.fixture(scope="module")
def quantized(
    smoke_run: Path, lora_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, tuple[str, ...]]]:
    return quantized_runs(CASES, smoke_run, lora_run, tmp_path_factory)


@pytest.mark.parametrize("case", CASES)
def test_the_forward_pass_keeps_the_rounded_experts(case: str, quantized) -> None:
    ref = references.of_artifact(artifacts.load(quantized(case)[0] / "quantize"))
    weights = Weights(ref)
    for projection in expert_projections(weights.shape):
        assert same_bits(weights.read_effective(projection.name), weights.read_trained(projection.name))


@pytest.mark.parametrize("case", ["full-mxfp4", "full-nvfp4", "lora-mxfp4", "parts-mxfp4"])
def test_qat_starts_from_it_and_the_export_is_verified_to_the_bit(case: str, quantized) -> None:
    run, settings = quantized(case)
    for stage in ("qat", "export", "verify"):
        assert run_program(f"stage={stage}", f"run_dir={run}", *settings) == 0, stage
    assert outcomes(run) <= {"ok", "not checked"}  # transformers does not load NVFP4
    details = artifacts.load(run / "qat").details
    assert details["validation_loss"] < details["validation_loss_before"]


def test_the_record_counts_the_experts_and_the_stage_leaves_no_other_file(quantized, smoke_run: Path) -> None:
    run, _ = quantized("full-mxfp4")
    details = artifacts.load(run / "quantize").details
    assert (details["method"], details["scales"]) == ("gptq", "ceil")
    assert details["fallback"] == {"experts": 16, "fallback_experts": 0, "without_tokens": 0}
    lines = [line for line in read_metrics(run / "quantize") if "fewest_tokens" in line]
    assert [line["layer"] for line in lines] == [0, 1]
    assert 0 < lines[0]["fewest_tokens"] < lines[0]["most_tokens"]
    assert artifacts.load(run / "quantize").files.keys() == artifacts.load(smoke_run / "quantize").files.keys()
    assert not (run / "quantize" / artifacts.CHECKPOINTS_DIR).exists()


def test_a_run_that_is_killed_between_layers_resumes_with_the_same_fingerprint(
    quantized, smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, settings = quantized("full-mxfp4")
    here = linked(tmp_path / "run", smoke_run, "source", "upcast", "sft")
    save = codes.LayerCodes.save

    def killed(self: codes.LayerCodes, layer: int, *others: Any) -> None:
        if layer == 1:
            raise KeyboardInterrupt
        save(self, layer, *others)

    with monkeypatch.context() as patch:
        patch.setattr(codes.LayerCodes, "save", killed)
        assert run_program("stage=quantize", f"run_dir={here}", *settings) == 130
    assert not (here / "quantize" / artifacts.ARTIFACT_FILE).exists()
    assert run_program("stage=quantize", f"run_dir={here}", *settings, "quantize.damping=0.1") == 2
    assert "is unfinished, and was begun with other inputs" in capsys.readouterr().err
    saved: list[int] = []
    monkeypatch.setattr(
        codes.LayerCodes, "save", lambda self, layer, *rest: (saved.append(layer), save(self, layer, *rest))
    )
    assert run_program("stage=quantize", f"run_dir={here}", *settings) == 0
    assert saved == [1]
    assert artifacts.load(here / "quantize").fingerprint == artifacts.load(whole / "quantize").fingerprint


def test_experts_with_too_few_tokens_are_warned_of_and_counted(
    smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = linked(tmp_path / "run", smoke_run, "source", "upcast", "sft")
    few = ("quantize.calibration_samples=2", "quantize.fallback=nearest")
    assert run_program("stage=quantize", f"run_dir={here}", *FULL, *few) == 0
    assert "16 of 16 experts had fewer than 8 calibration tokens per input dimension" in capsys.readouterr().err
    assert artifacts.load(here / "quantize").details["fallback"]["fallback_experts"] == 16


def test_auto_keeps_the_nearest_rounding_with_the_bytes_of_asking_for_it(
    quantized, smoke_run: Path, tmp_path: Path
) -> None:
    direct, settings = quantized("full-mxfp4")
    here = linked(tmp_path / "run", smoke_run, "source", "upcast", "sft")
    asked = [each for each in settings if each != GPTQ]
    assert run_program("stage=quantize", f"run_dir={here}", *asked, "quantize.method=auto") == 0
    details = artifacts.load(here / "quantize").details
    found = {(each["method"], each["scales"]): each["kl_divergence"] for each in details["candidates"]}
    assert list(found) == [("nearest", "ceil"), ("nearest", "base"), ("stochastic", "base"), ("gptq", "ceil")]
    assert (details["method"], details["scales"]) == min(found, key=lambda each: found[each]) == ("gptq", "ceil")
    assert found["gptq", "ceil"] < found["nearest", "ceil"] / 5
    assert artifacts.load(here / "quantize").fingerprint == artifacts.load(direct / "quantize").fingerprint
    logged = [line["kl_divergence"] for line in read_metrics(here / "quantize") if "candidate" in line]
    assert logged == list(found.values())


def test_auto_with_given_scales_writes_the_result_for_lora(lora_run: Path, tmp_path: Path) -> None:
    here = linked(tmp_path / "run", lora_run, "source", "upcast", "sft")
    asked = [each for each in LORA if each != GPTQ]
    settings = (f"run_dir={here}", *asked, "quantize.method=auto", "quantize.scales=mse", "quantize.auto_samples=3")
    for stage in ("quantize", "qat", "export", "verify"):
        assert run_program(f"stage={stage}", *settings) == 0, stage
    assert {each["scales"] for each in artifacts.load(here / "quantize").details["candidates"]} == {"mse"}
    assert outcomes(here) == {"ok"}


# Mistakes.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("format=nvfp4_w4a4", "export.target=nvfp4"), ("quantize.method=gptq", "format=nvfp4_w4a4", "stochastic")),
        (("format=nvfp4", "export.target=nvfp4", "format.scale_rule=ceil"), ("quantize.method=gptq", "only", "mse")),
        (("quantize.damping=0",), ("quantize.damping=0", "greater than 0")),
        (("quantize.tokens_per_input=-1",), ("quantize.tokens_per_input=-1", "greater than 0")),
        (("quantize.fallback=gptq",), ("quantize.fallback", "gptq", "nearest")),
    ],
)
def test_settings_that_gptq_cannot_use_are_refused_before_any_work(
    settings: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(capsys, "stage=quantize", *FULL, f"run_dir={tmp_path / 'run'}", *settings)
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_more_calibration_examples_than_the_data_has_are_refused(smoke_run: Path, tmp_path: Path, capsys) -> None:
    here = linked(tmp_path / "run", smoke_run, "source", "upcast", "sft")
    message = error_of(capsys, "stage=quantize", *FULL, f"run_dir={here}", "quantize.calibration_samples=100000")
    assert "quantize.calibration_samples=100000" in message and "training examples" in message


def test_a_damping_that_is_too_small_names_the_expert(smoke_run: Path, tmp_path: Path, capsys) -> None:
    here = linked(tmp_path / "run", smoke_run, "source", "upcast", "sft")
    tiny = ("quantize.damping=1e-30", "quantize.calibration_samples=1", "quantize.tokens_per_input=0.01")
    message = error_of(capsys, "stage=quantize", *FULL, f"run_dir={here}", *tiny)
    assert "mlp.experts." in message and "expert " in message and "larger quantize.damping" in message
    assert json.loads((here / "quantize" / "unfinished.json").read_text())
