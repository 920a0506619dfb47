"""LoRA on packed experts gives the same results as LoRA on decoded experts, without a decoded copy on disk.

A BF16 source can be packed first. Mistakes are refused with clear messages.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ONE_LAYER, SHORT, linked, outcomes, run_program
from run_files import losses
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import shards
from pipeline.checkpoints.reading import Checkpoint
from pipeline.models import loading, packed_experts, references
from pipeline.numerics.codec import same_bits
from pipeline.runs import artifacts, host_memory
from pipeline.runs.artifacts import Kind

SETTINGS = ("recipe=smoke_lora", *SHORT, *ONE_LAYER)
IDS = torch.arange(60).reshape(2, 30)


@pytest.fixture(scope="module")
def decoded(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run like `lora_run`, but with decoded experts. It ends with qat. Tests must not write to it."""
    run_dir = linked(tmp_path_factory.mktemp("decoded") / "run", lora_run, "source")
    for stage in ("upcast", "sft", "quantize", "qat"):
        assert run_program(f"stage={stage}", f"run_dir={run_dir}", *SETTINGS, "upcast.experts=bf16") == 0
    return run_dir


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


@pytest.fixture(scope="module")
def plain(decoded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 checkpoint with the values of the packed source. Tests must not write to it."""
    source = Path(shutil.copytree(decoded / "upcast", tmp_path_factory.mktemp("plain") / "source"))
    (source / artifacts.ARTIFACT_FILE).unlink()
    return source


def spoilt_copy(plain: Path, target: Path) -> Path:
    """Copy a BF16 checkpoint, and give two experts a weight that MXFP4 cannot hold."""
    source = Path(shutil.copytree(plain, target))
    name = "model.layers.1.mlp.experts.down_proj"
    (path,) = (path for path in source.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(path)
    tensors[name][:2, 0, 0] = 1 + 2**-7
    save_file(tensors, path, {"format": "pt"})
    return source


@pytest.fixture(scope="module")
def repacked(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run whose BF16 source is packed, up to verify. Tests must not write to it."""
    run_dir: Path = tmp_path_factory.mktemp("repacked") / "run"
    settings = (f"run_dir={run_dir}", f"model.path={plain}", *SETTINGS, "upcast.experts=packed")
    for stage in ("upcast", "sft", "quantize", "qat", "export", "verify"):
        assert run_program(f"stage={stage}", *settings) == 0, stage
    return run_dir


def test_a_bf16_source_with_mxfp4_values_is_packed(repacked: Path, plain: Path, lora_run: Path) -> None:
    upcast = artifacts.load(repacked / "upcast")
    assert (upcast.kind, upcast.format, upcast.scale_rule) == (Kind.packed, "mxfp4", "ceil")
    assert upcast.fingerprint == artifacts.fingerprint_of(upcast.directory)[0]
    packed, released, source = (Checkpoint(path) for path in (upcast.directory, lora_run / "upcast", plain))
    assert (packed.config, packed.tensors) == (released.config, released.tensors)
    assert all(same_bits(packed.read_plain(name), source.read(name)) for name in source.tensors)
    counts = {name: upcast.details[f"{name}_tensors"] for name in ("decoded", "packed", "copied")}
    assert counts == {"decoded": 0, "packed": 4, "copied": len(source.tensors) - 4}


def test_training_on_a_packed_bf16_source_equals_training_on_the_released_one(repacked: Path, lora_run: Path) -> None:
    assert losses(repacked) == losses(lora_run)
    found, expected = (load_file(run / "qat" / "adapter_model.safetensors") for run in (repacked, lora_run))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "FAILED" not in outcomes(repacked)


def test_by_default_a_bf16_source_is_linked(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("stage=upcast", f"model.path={plain}", f"run_dir={tmp_path}", *SETTINGS) == 0
    assert "the source is BF16 already" in capsys.readouterr().out
    assert artifacts.load(tmp_path / "upcast").kind is Kind.checkpoint


def test_an_interrupted_packing_resumes_to_the_same_bytes(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("stage=upcast", f"model.path={plain}", *SETTINGS, "upcast.experts=packed", "upcast.shard_bytes=60000")
    whole, killed = (f"run_dir={tmp_path / name}" for name in ("whole", "killed"))
    assert run_program(*settings, whole) == 0
    publish = shards._Output.publish

    def interrupt(self: shards._Output, i: int) -> None:
        if i == 3:
            raise KeyboardInterrupt
        publish(self, i)

    with monkeypatch.context() as patched:
        patched.setattr(shards._Output, "publish", interrupt)
        assert run_program(*settings, killed) == 130
    upcast = tmp_path / "killed" / "upcast"
    assert not (upcast / artifacts.ARTIFACT_FILE).exists()
    finished = {path: path.stat().st_mtime_ns for path in upcast.glob("*.safetensors")}
    assert len(finished) == 3
    assert run_program(*settings, killed) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    one, other = artifacts.load(tmp_path / "whole" / "upcast"), artifacts.load(upcast)
    assert len(one.files) > 8 and (one.fingerprint, one.details) == (other.fingerprint, other.details)


def test_a_bf16_source_with_other_values_is_refused_and_both_remedies_work(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run_dir = spoilt_copy(plain, tmp_path / "source"), tmp_path / "run"
    settings = (f"model.path={source}", f"run_dir={run_dir}", *SETTINGS)
    assert run_program("stage=upcast", *settings, "upcast.experts=packed") == 2
    (message,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert f"upcast.experts=packed: {source} has weights that MXFP4 cannot hold exactly: 2 of " in message
    assert "in 1 of 4 tensors. The first is model.layers.1.mlp.experts.down_proj." in message
    left = {path.name for path in (run_dir / "upcast").iterdir()}
    assert left <= artifacts.BOOKKEEPING - {artifacts.ARTIFACT_FILE, artifacts.SHARDS_FILE}
    assert run_program("stage=upcast", *settings, "upcast.experts=bf16") == 0
    assert run_program("stage=export", *settings, "export.source=upcast") == 0
    again = (f"model.path={run_dir / 'export'}", f"run_dir={tmp_path / 'again'}", *SETTINGS)
    assert run_program("stage=upcast", *again, "upcast.experts=packed") == 0
    assert artifacts.load(tmp_path / "again" / "upcast").kind is Kind.packed


@pytest.mark.parametrize(
    ("recipe", "qat", "kind"), [("smoke", "lora", Kind.packed), ("smoke_lora", "full", Kind.checkpoint)]
)
def test_without_sft_upcast_makes_the_form_that_qat_trains(recipe: str, qat: str, kind: Kind, tmp_path: Path) -> None:
    """The method of QAT differs from the method of the recipe and of SFT."""
    settings = (f"recipe={recipe}", f"train@qat={qat}", "quantize.source=upcast", f"run_dir={tmp_path}", *SHORT)
    for stage in ("upcast", "quantize", "qat", "export", "verify"):
        assert run_program(f"stage={stage}", *settings, "qat.max_steps=2", "qat.precision=bf16") == 0, stage
    assert artifacts.load(tmp_path / "upcast").kind is kind
    assert artifacts.load(tmp_path / "qat").kind is (Kind.adapter if qat == "lora" else Kind.checkpoint)
    assert "FAILED" not in outcomes(tmp_path)


def test_full_qat_of_a_packed_upcast_without_sft_starts_from_decoded_weights(lora_run: Path, tmp_path: Path) -> None:
    run_dir = linked(tmp_path / "run", lora_run, "source", "upcast")
    settings = ("recipe=smoke_lora", *SHORT, "train@qat=full", "quantize.source=upcast", "qat.max_steps=2")
    for stage in ("quantize", "qat", "export", "verify"):
        assert run_program(f"stage={stage}", f"run_dir={run_dir}", *settings) == 0, stage
    assert not Checkpoint(run_dir / "quantize").is_packed
    assert "FAILED" not in outcomes(run_dir)


def test_adapters_of_another_base_are_refused(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = linked(tmp_path / "run", lora_run, "sft")
    settings = (f"run_dir={run_dir}", *SETTINGS, "model.tiny.seed=5")
    assert run_program("stage=upcast", *settings) == 0
    for stage in ("quantize", "export"):
        assert run_program(f"stage={stage}", *settings) == 2
        assert f"{run_dir / 'sft'} was made from an earlier upcast" in capsys.readouterr().err


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


def test_verify_packs_the_rounded_experts_if_the_trained_model_does_not_fit(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = linked(tmp_path / "run", smoke_run, "source", "upcast", "sft")
    settings = (f"run_dir={run_dir}", "recipe=smoke", *SHORT)
    assert run_program("stage=export", *settings, "export.source=sft") == 0
    trained = sum(parameter.nbytes for parameter in loading.load_plain(run_dir / "sft", torch.float32).parameters())
    monkeypatch.setattr(host_memory, "available_bytes", lambda: trained - 1)
    assert run_program("stage=verify", *settings) == 0
    assert "The rounded experts are packed in memory instead." in capsys.readouterr().err
    assert outcomes(run_dir) == {"ok"}
    report = json.loads((run_dir / "verify" / "report.json").read_text(encoding="utf-8"))
    (logits,) = (check for check in report["checks"] if check["title"].startswith("logits"))
    assert logits["measured"]["largest_difference"] == 0

    monkeypatch.setattr(host_memory, "available_bytes", lambda: trained // 4)
    assert run_program("stage=verify", *settings, "verify.samples=1") == 1
    assert "B of host memory, but only" in capsys.readouterr().err
