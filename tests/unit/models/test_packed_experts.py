"""Packed experts give the same results as transformers' experts with PEFT's adapters and the quantizers."""

from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from pipeline.checkpoints.gpt_oss import BIAS_SUFFIX, EXPERT_WEIGHTS, SCALES_SUFFIX
from pipeline.models import adapters, expert_products, fake_quantizers, packed_experts, packed_passes, quantizer_backend
from pipeline.models.adapted_names import is_factor
from pipeline.models.packed_experts import PackedExperts
from pipeline.numerics.codec import encode
from pipeline.numerics.formats import MXFP4, NVFP4, NVFP4_W4A4, BlockFormat

HIDDEN, INNER, EXPERTS, CHOSEN, TOKENS = 64, 96, 8, 3, 40
FORMATS = [None, MXFP4, NVFP4, NVFP4_W4A4]


class Layer(nn.Module):
    """A layer in which the experts have the same name as in a whole model."""

    def __init__(self, config: GptOssConfig, experts: nn.Module) -> None:
        super().__init__()
        self.config, self.mlp = config, nn.Module()
        self.mlp.experts = experts

    def forward(self, *inputs: Tensor) -> Any:
        return self.mlp.experts(*inputs)


def config() -> GptOssConfig:
    made = GptOssConfig(
        num_hidden_layers=1,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        vocab_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    made._experts_implementation = "eager"
    return made


@torch.no_grad()
def layers(dtype: torch.dtype) -> tuple[Layer, Layer]:
    """Return a layer with packed experts and one with plain experts, which have the same random weights."""
    torch.manual_seed(0)
    packed, plain = PackedExperts(config(), dtype), GptOssExperts(config()).to(dtype).requires_grad_(False)
    for name in EXPERT_WEIGHTS:
        width, out = packed.features[name]
        blocks, scales = encode(torch.randn(EXPERTS, out, width) * 0.1, MXFP4)
        getattr(packed, name).copy_(blocks)
        packed.scales(name).copy_(scales)
        packed.bias(name).copy_(torch.randn(EXPERTS, out) * 0.3)
        getattr(plain, name).copy_(packed.decode(name, slice(None)))
        getattr(plain, name + BIAS_SUFFIX).copy_(packed.bias(name))
    packed.requires_grad_(False)
    return Layer(config(), packed), Layer(config(), plain)


def adapted(layer: Layer, rank: int = 8) -> nn.Module:
    """Attach adapters with random factors to both projections."""
    settings = PeftLoraConfig(
        r=rank, lora_alpha=16, target_modules=[], target_parameters=[f"mlp.experts.{name}" for name in EXPERT_WEIGHTS]
    )
    if packed_experts.is_packed(layer):
        adapters._register(settings, PackedExperts, adapters._PackedWrapper)
    model: nn.Module = get_peft_model(layer, settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if is_factor(name):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def quantized(model: nn.Module, block_format: BlockFormat | None) -> nn.Module:
    if block_format is not None:
        fake_quantizers.insert(model, block_format, lambda _: None)
        for name, quantizer in fake_quantizers.find_enabled(model):
            if name.endswith("_input_quantizer"):
                quantizer.amax = torch.tensor(4.0)
    return model


def inputs(dtype: torch.dtype, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return states, chosen experts, shares, and a gradient of the output. Expert 0 gets no token."""
    torch.manual_seed(2)
    scores = torch.randn(tokens, EXPERTS).index_fill(1, torch.tensor([0]), -torch.inf).topk(CHOSEN)
    shares = scores.values.softmax(-1)
    states, gradient = torch.randn(2, tokens, HIDDEN)
    return states.to(dtype), scores.indices, shares.to(dtype), gradient.to(dtype)


def run(model: nn.Module, dtype: torch.dtype, *, checkpointed: bool = False) -> dict[str, Tensor]:
    """Return the output and all gradients of a forward and a backward pass."""
    states, chosen, shares, gradient = inputs(dtype)
    states.requires_grad_()
    shares.requires_grad_()
    if checkpointed:
        output = torch.utils.checkpoint.checkpoint(model, states, chosen, shares, use_reentrant=False)
    else:
        output = model(states, chosen, shares)
    output.backward(gradient)
    found = {"output": output.detach(), "states": states.grad, "shares": shares.grad}
    found |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in found.items() if value is not None}


def rounded_weights(model: nn.Module, budget: float, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Run two forward passes, and return the rounded weights of each expert in the second pass."""
    fake_quantizers.keep_rounded(model, budget)
    found: dict[str, Tensor] = {}

    def show(kind: str) -> Any:
        return lambda values, first: found.update({f"{kind} {i}": each.clone() for i, each in enumerate(values, first)})

    for name, quantizer in fake_quantizers.find_enabled(model):
        state = quantizer_backend.state_of(quantizer)
        state.shows_all = True
        state.observers.append(show(name.rpartition(".")[2]))
    for _ in range(2):
        model(*batch)
    return found


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {
        name: float((found[name] - value).double().norm() / value.double().norm()) for name, value in expected.items()
    }


@pytest.mark.parametrize("block_format", FORMATS, ids=lambda each: "no quantizers" if each is None else each.name)
@pytest.mark.parametrize("at_once", [1, 3 * 4 * 2 * INNER * HIDDEN, 1 << 30], ids=["one expert", "three", "all"])
def test_outputs_and_gradients_are_those_of_plain_experts_with_pefts_adapters(
    at_once: int, block_format: BlockFormat | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(packed_passes.DECODED_BYTES, "cpu", at_once)
    packed, plain = (quantized(adapted(layer), block_format) for layer in layers(torch.float32))
    errors = relative_errors(run(packed, torch.float32), run(plain, torch.float32))
    assert max(errors.values()) < 1e-6, errors
    assert len(errors) == 7


def test_rolled_parts_of_a_gpu_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, plain = (adapted(layer) for layer in layers(torch.float32))
    monkeypatch.setitem(packed_passes.DECODED_BYTES, "cpu", 3 * 4 * 2 * INNER * HIDDEN)

    def rolled(chosen: Tensor, slots: Tensor, ends: Tensor, count: int, **_: bool) -> Any:
        return packed_passes._rolled(chosen, slots, ends, count)

    monkeypatch.setattr(packed_passes, "_slices", rolled)
    errors = relative_errors(run(packed, torch.float32), run(plain, torch.float32))
    assert max(errors.values()) < 1e-6, errors


def test_biases_can_be_trained() -> None:
    packed, plain = layers(torch.float32)
    for layer in (packed, plain):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name.endswith(BIAS_SUFFIX))
    errors = relative_errors(run(packed, torch.float32), run(plain, torch.float32))
    assert len(errors) == 5 and max(errors.values()) < 1e-6, errors


def test_gradients_of_bf16_biases_are_summed_in_fp32() -> None:
    (packed, _), (exact, _) = layers(torch.bfloat16), layers(torch.float32)
    for layer in (packed, exact):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name.endswith(BIAS_SUFFIX))
    states, chosen, shares, gradient = inputs(torch.float32, tokens=4096)
    packed(
        *(each.to(torch.bfloat16) if each.is_floating_point() else each for each in (states, chosen, shares))
    ).backward(gradient.to(torch.bfloat16))
    exact(states, chosen, shares).backward(gradient)
    for name in EXPERT_WEIGHTS:
        found, expected = packed.mlp.experts.bias(name).grad.float(), exact.mlp.experts.bias(name).grad
        assert (found - expected).norm() / expected.norm() < 0.01, name


def test_experts_with_fp32_biases_can_compute_in_bf16() -> None:
    mixed = PackedExperts(config(), torch.float32, computes_in=torch.bfloat16)
    (other, _) = layers(torch.bfloat16)
    mixed.load_state_dict(other.mlp.experts.state_dict())
    states, chosen, shares, gradient = inputs(torch.float32)
    output = mixed(states, chosen, shares)
    output.backward(gradient)
    expected = other(states.to(torch.bfloat16), chosen, shares.to(torch.bfloat16))
    assert mixed.decode(EXPERT_WEIGHTS[0], slice(0, 1)).dtype is torch.bfloat16 and output.dtype is torch.float32
    assert torch.equal(output.to(torch.bfloat16), expected)
    assert all(mixed.bias(name).grad.dtype is torch.float32 for name in EXPERT_WEIGHTS)


@pytest.mark.parametrize("block_format", [None, MXFP4], ids=["no quantizers", "mxfp4"])
def test_bf16_differs_from_plain_experts_by_roundings_only(block_format: BlockFormat | None) -> None:
    packed, plain = (quantized(adapted(layer), block_format) for layer in layers(torch.bfloat16))
    errors = relative_errors(run(packed, torch.bfloat16), run(plain, torch.bfloat16))
    assert max(errors.values()) < 0.01, errors


@pytest.mark.parametrize("block_format", FORMATS[1:3], ids=lambda each: each.name)
@pytest.mark.parametrize("budget", [0, float("inf")], ids=["no cache", "cache"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounded_weights_have_the_bits_of_plain_experts(
    dtype: torch.dtype, budget: float, block_format: BlockFormat
) -> None:
    packed, plain = (
        rounded_weights(quantized(adapted(layer), block_format), budget, inputs(dtype)[:3]) for layer in layers(dtype)
    )
    assert packed.keys() == plain.keys() and len(packed) == 2 * EXPERTS
    for name, values in plain.items():
        assert torch.equal(packed[name], values), name


def test_an_experts_weights_are_decoded_twice_in_a_checkpointed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = layers(torch.float32)
    model, decoded = adapted(packed), []
    decode = PackedExperts.decode_packed
    monkeypatch.setattr(
        PackedExperts, "decode_packed", lambda self, name, *rest: decoded.append(name) or decode(self, name, *rest)
    )
    errors = relative_errors(run(model, torch.float32, checkpointed=True), run(model, torch.float32))
    assert set(errors.values()) <= {0.0} or max(errors.values()) < 1e-6
    visited = EXPERTS - 1
    assert len(decoded) == 2 * 2 * 2 * visited  # two runs, two passes, two projections


def test_nothing_as_large_as_a_stack_is_kept_for_the_backward_pass() -> None:
    packed, _ = layers(torch.float32)
    model = quantized(adapted(packed), MXFP4)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        states, chosen, shares, _ = inputs(torch.float32)
        model(states.requires_grad_(), chosen, shares.requires_grad_())
    assert max(kept) <= TOKENS * HIDDEN


def test_the_scales_and_blocks_are_frozen_parameters() -> None:
    packed, _ = layers(torch.float32)
    parameters = dict(packed.mlp.experts.named_parameters())
    for name in EXPERT_WEIGHTS:
        assert parameters[name].dtype is parameters[name + SCALES_SUFFIX].dtype is torch.uint8
        assert not parameters[name].requires_grad
    assert dict(packed.mlp.experts.named_buffers()) == {}


def test_the_products_of_a_loop_are_those_of_a_grouped_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packed_passes.DECODED_BYTES, "cpu", 1 << 30)
    found = []
    for multiply in (expert_products.multiply_grouped, expert_products.multiply_in_loop):
        packed, _ = layers(torch.float32)
        packed.mlp.experts.multiply = multiply
        found.append(run(adapted(packed), torch.float32))
    assert max(relative_errors(*found).values()) < 1e-6


@pytest.mark.parametrize("block_format", FORMATS, ids=lambda each: "no quantizers" if each is None else each.name)
def test_few_tokens_without_gradients_decode_only_their_experts(
    block_format: BlockFormat | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, plain = (quantized(adapted(layer), block_format) for layer in layers(torch.float32))
    batch = inputs(torch.float32, tokens=2)[:3]
    monkeypatch.setitem(packed_passes.DECODED_BYTES, "cpu", 1 << 30)
    decoded: list[int] = []
    choose = PackedExperts.packed

    def count(self: PackedExperts, name: str, experts: slice | Tensor) -> tuple[Tensor, Tensor]:
        blocks, scales = choose(self, name, experts)
        decoded.append(len(blocks))
        return blocks, scales

    monkeypatch.setattr(PackedExperts, "packed", count)
    with torch.no_grad():
        torch.testing.assert_close(packed(*batch), plain(*batch), rtol=1e-5, atol=1e-5)
    assert decoded == [2 * CHOSEN] * 2
