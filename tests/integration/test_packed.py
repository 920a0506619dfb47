"""LoRA on packed experts: no decoded copy on disk, the results of the decoded path, and clear errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ONE_LAYER, SHORT, linked, outcomes, run_program
from safetensors.torch import load_file

from pipeline.checkpoints.reading import Checkpoint
from pipeline.models import loading, packed_experts, references
from pipeline.runs import artifacts, host_memory
from pipeline.runs.artifacts import Kind
from pipeline.runs.metrics import read_metrics

SETTINGS = ("recipe=smoke_lora", *SHORT, *ONE_LAYER)
IDS = torch.arange(60).reshape(2, 30)


@pytest.fixture(scope="module")
def decoded(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `lora_run` with decoded experts, up to qat. Tests must not write to it."""
    run_dir = linked(tmp_path_factory.mktemp("decoded") / "run", lora_run, "source")
    for stage in ("upcast", "sft", "quantize", "qat"):
        assert run_program(f"stage={stage}", f"run_dir={run_dir}", *SETTINGS, "upcast.experts=bf16") == 0
    return run_dir


def losses(run_dir: Path) -> list[float]:
    lines = [line for stage in ("sft", "qat") for line in read_metrics(run_dir / stage)]
    return [line[key] for line in lines for key in ("loss", "eval_loss") if key in line]


def test_upcast_links_the_source_and_decodes_nothing(lora_run: Path) -> None:
    upcast = artifacts.load(lora_run / "upcast")
    (source,) = (lora_run / "source").iterdir()
    assert upcast.kind is Kind.packed and upcast.details["decoded_tensors"] == 0
    files = sorted(path.name for path in source.glob("*.safetensors"))
    assert files and all((lora_run / "upcast" / name).samefile(source / name) for name in files)


def test_training_on_packed_experts_has_the_losses_of_training_on_decoded_ones(lora_run: Path, decoded: Path) -> None:
    assert artifacts.load(decoded / "upcast").kind is Kind.checkpoint
    found, expected = losses(lora_run), losses(decoded)
    assert len(found) > 10 and found == pytest.approx(expected, rel=1e-3)


def test_adapters_have_the_same_names_and_shapes_as_those_of_decoded_experts(lora_run: Path, decoded: Path) -> None:
    for stage in ("sft", "qat"):
        found, expected = (load_file(run / stage / "adapter_model.safetensors") for run in (lora_run, decoded))
        assert {name: tensor.shape for name, tensor in found.items()} == {
            name: tensor.shape for name, tensor in expected.items()
        }


@pytest.mark.parametrize("stage", ["upcast", "sft", "quantize", "qat", "export"])
def test_a_model_for_evaluation_stays_packed_and_computes_the_same_as_a_decoded_one(stage: str, lora_run: Path) -> None:
    ref = references.of_artifact(artifacts.load(lora_run / stage))
    model = loading.load_effective(ref, torch.float32)
    assert packed_experts.is_packed(model)
    plain = loading.load_plain(ref.base, torch.float32)
    weights = loading.Weights(ref)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights.read_effective(name))
        torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-3, atol=1e-3)


def test_full_qat_after_lora_on_packed_experts_starts_from_decoded_weights(lora_run: Path, tmp_path: Path) -> None:
    run_dir = linked(tmp_path / "run", lora_run, "source", "upcast", "sft")
    settings = ("recipe=smoke_lora", *SHORT, "sft.lora.layers=[1]", "qat.method=full", "qat.max_steps=2")
    for stage in ("quantize", "qat", "export", "verify"):
        assert run_program(f"stage={stage}", f"run_dir={run_dir}", *settings) == 0, stage
    assert not Checkpoint(run_dir / "quantize").is_packed
    assert "FAILED" not in outcomes(run_dir)


def test_lora_qat_of_the_packed_source_without_sft(lora_run: Path, tmp_path: Path) -> None:
    run_dir = linked(tmp_path / "run", lora_run, "source", "upcast")
    for stage in ("quantize", "qat", "export", "verify"):
        assert run_program(f"stage={stage}", f"run_dir={run_dir}", *SETTINGS, "quantize.source=upcast") == 0, stage
    assert "FAILED" not in outcomes(run_dir)


def test_packed_experts_and_full_training_are_refused(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = linked(tmp_path / "run", lora_run, "source", "upcast")
    assert run_program("stage=upcast", "recipe=smoke", f"run_dir={tmp_path}", "upcast.experts=packed") == 2
    assert "upcast.experts=packed: sft.method=full trains the experts' weights" in capsys.readouterr().err
    assert run_program("stage=sft", "recipe=smoke", f"run_dir={run_dir}", *SHORT) == 2
    error = capsys.readouterr().err
    assert "sft.method=full: the experts in" in error and "upcast.experts=bf16 overwrite=true" in error


def test_packed_experts_of_a_bf16_source_are_refused(
    decoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(decoded / "upcast", tmp_path / "source"))
    (source / artifacts.ARTIFACT_FILE).unlink()
    settings = ("stage=upcast", f"model.path={source}", f"run_dir={tmp_path / 'run'}", *SETTINGS)
    assert run_program(*settings, "upcast.experts=packed") == 2
    assert "because the source is not MXFP4" in capsys.readouterr().err
    assert not (tmp_path / "run" / "upcast" / artifacts.ARTIFACT_FILE).exists()
    assert run_program(*settings) == 0
    assert "the source is BF16 already" in capsys.readouterr().out


def test_verify_keeps_the_export_packed_if_the_decoded_one_does_not_fit(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = linked(tmp_path / "run", lora_run, "source", "upcast", "sft", "quantize", "qat", "export")
    decoded = sum(parameter.nbytes for parameter in loading.load_plain(run_dir / "export", torch.float32).parameters())
    monkeypatch.setattr(host_memory, "available_bytes", lambda: decoded - 1)
    assert run_program("stage=verify", f"run_dir={run_dir}", *SETTINGS) == 0
    assert "keeps experts packed" in capsys.readouterr().err
    report = json.loads((run_dir / "verify" / "report.json").read_text(encoding="utf-8"))
    assert any("whether transformers loads the export" in each for each in report["not_checked"])
