"""LoRA on attention and experts, from SFT to the export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, linked, outcomes, run_program

from pipeline.checkpoints.gpt_oss import expert_projections
from pipeline.checkpoints.reading import Checkpoint
from pipeline.models import adapters, loading, packed_passes, quantizer_backend, references
from pipeline.models.adapted_names import parameter_name
from pipeline.models.weights import Weights
from pipeline.numerics import packed_rounding
from pipeline.numerics.codec import fake_quantize
from pipeline.runs import artifacts

BATCH = {"input_ids": torch.arange(40).reshape(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.long)}

ADAPTED = ("_proj.weight", "experts.gate_up_proj", "experts.down_proj")


def test_the_whole_run_is_proven(lora_run: Path) -> None:
    assert outcomes(lora_run) == {"ok"}


def test_only_adapters_are_stored(lora_run: Path) -> None:
    artifact = artifacts.load(lora_run / "sft")
    assert artifact.kind is artifacts.Kind.adapter
    assert artifact.details["base"] == "upcast"
    assert not list(artifact.directory.glob("model*.safetensors"))


def test_qat_trains_the_adapters_of_sft_on(lora_run: Path) -> None:
    sft, qat = (Weights(references.of_artifact(artifacts.load(lora_run / stage))) for stage in ("sft", "qat"))
    name = "model.layers.1.mlp.experts.down_proj"
    assert not torch.equal(sft.read_trained(name), qat.read_trained(name))


def test_layers_without_adapters_keep_their_weights(lora_run: Path) -> None:
    upcast, qat = Checkpoint(lora_run / "upcast"), Weights(references.of_artifact(artifacts.load(lora_run / "qat")))
    for name in qat.names():
        adapted = name.startswith("model.layers.1.") and name.endswith(ADAPTED)
        assert torch.equal(qat.read_trained(name), upcast.read_plain(name)) != adapted, name


def test_merged_experts_are_what_the_quantizers_are_given(lora_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = references.of_artifact(artifacts.load(lora_run / "qat"))
    model, weights = loading.load_quantized(ref, ref.dtype), Weights(ref)
    given: dict[str, torch.Tensor] = {}
    names = {
        module: parameter_name(name).removesuffix("_weight_quantizer")
        for name, module in adapters.base_of(model).named_modules()
        if type(module).__name__ == "TensorQuantizer"
    }
    asked: list[torch.nn.Module] = []

    def note_quantizer(function: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            asked.append(arguments[place])
            return function(*arguments)

        return call

    def note_values(values: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
        given[names[asked[-1]]] = values.detach()
        return fake_quantize(values, *others, **more)

    for function, place in ((quantizer_backend.round_values, 1), (quantizer_backend.round_packed, 3)):
        monkeypatch.setattr(quantizer_backend, function.__name__, note_quantizer(function, place))
    for module in (quantizer_backend, packed_rounding):
        monkeypatch.setattr(module, "fake_quantize", note_values)
    monkeypatch.setitem(packed_passes.DECODED_BYTES, "cpu", 1 << 30)  # all experts of a layer at once
    model(**BATCH)
    assert given.keys() == {projection.name for projection in expert_projections(weights.shape)}
    for name, values in given.items():
        assert torch.equal(values.transpose(1, 2), weights.read_trained(name)), name


def test_adapters_merge_to_base_plus_delta(lora_run: Path) -> None:
    """Compare with PEFT's documented formula: the delta of expert e is scale * B_e A_e.

    For all experts together, A is stored as (r E, in), and B as (out, r E).
    """
    from safetensors.torch import load_file

    directory = lora_run / "sft"
    config = json.loads((directory / "adapter_config.json").read_text())
    factors = load_file(directory / "adapter_model.safetensors")
    weights = Weights(references.of_artifact(artifacts.load(directory)))
    base = Checkpoint(lora_run / "upcast").read_plain("model.layers.1.mlp.experts.gate_up_proj").double()
    experts, rank, scale = base.shape[0], config["r"], config["lora_alpha"] / config["r"]
    # Only factor B of gate_up_proj has this output size. The name of factor A has lora_A instead of lora_B.
    (b_name,) = (name for name, factor in factors.items() if factor.shape == (base.shape[2], rank * experts))
    a = factors[b_name.replace("lora_B", "lora_A")].double().reshape(experts, rank, -1)
    b = factors[b_name].double().reshape(-1, rank, experts)
    expected = base + scale * torch.einsum("ore,eri->eio", b, a)
    merged = weights.read_trained("model.layers.1.mlp.experts.gate_up_proj").double()
    assert (merged - base).abs().max() > 1e-3
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("before", "method", "kind"),
    [("lora_run", "full", artifacts.Kind.checkpoint), ("smoke_run", "lora", artifacts.Kind.adapter)],
)
def test_sft_adapters_are_merged_for_full_qat_and_attached_for_lora_qat(
    before: str, method: str, kind: artifacts.Kind, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run_dir = linked(tmp_path / "run", request.getfixturevalue(before), "source", "upcast", "sft")
    settings = (f"run_dir={run_dir}", "recipe=smoke", *SHORT, "qat.max_steps=2", f"train@qat={method}")
    for stage in ("quantize", "qat", "export", "verify"):
        assert run_program(f"stage={stage}", *settings) == 0
    assert artifacts.load(run_dir / "quantize").kind is kind
    assert artifacts.load(run_dir / "qat").kind is kind


def test_adapters_that_differ_between_sft_and_qat_are_refused(capsys) -> None:
    assert run_program("stage=sft", "recipe=smoke_lora", "sft.lora.rank=4") == 2
    message = capsys.readouterr().err
    assert "qat.lora={rank: 8" in message
    assert "sft.lora={rank: 4" in message
