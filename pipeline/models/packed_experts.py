"""The experts of a gpt-oss layer. Their weights stay packed in memory, as MXFP4 blocks and scales.

The weights are frozen. They are decoded for a few experts at a time, in the forward pass and again in the backward
pass. The decoded weights are not kept between the two passes. Adapters (`Factors`) enter in one of two ways:
- Without quantizers, rows are multiplied by the factors: x W + s (x A) B.
- With quantizers, base + delta is rounded as the export rounds it: x round(W + s A B). Gradients pass straight through
  the rounding.

Shapes: T tokens, K experts per token, E experts, g experts decoded at a time, H hidden size, I intermediate size.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from pipeline.checkpoints.gpt_oss import BIAS_SUFFIX, DOWN, EXPERT_WEIGHTS, GATE_UP, SCALES_SUFFIX
from pipeline.models import expert_products
from pipeline.models.expert_products import Factors, Multiply
from pipeline.models.packed_passes import Pass
from pipeline.numerics.codec import decode
from pipeline.numerics.formats import MXFP4


class PackedExperts(nn.Module):
    """Replaces transformers' GptOssExperts. Its frozen weights are packed.

    Blocks and scales are parameters, not buffers: FSDP2 shards only parameters, and DDP would broadcast buffers before
    every forward pass. Blocks have the name of the plain weights, because PEFT finds the weights by this name.

    Attributes:
        features: for each projection, the numbers of input and output features.
        multiply: function that multiplies rows by the weights of their experts.
        dtype: type that the experts compute in.
    """

    is_transposed = True  # for PEFT: adapters are those of plain weights, (E, in, out)
    alpha, limit = 1.702, 7.0

    def __init__(self, config: Any, dtype: torch.dtype, computes_in: torch.dtype | None = None) -> None:
        """Create the parameters without values.

        Args:
            config: transformers' configuration of the model.
            dtype: type of the biases.
            computes_in: type of the weights after decoding, and of all products. None means `dtype`.
        """
        super().__init__()
        self.dtype: torch.dtype = dtype if computes_in is None else computes_in
        hidden, inner = config.hidden_size, config.intermediate_size
        self.num_experts: int = config.num_local_experts
        self.features: dict[str, tuple[int, int]] = {GATE_UP: (hidden, 2 * inner), DOWN: (inner, hidden)}
        self.multiply: Multiply = expert_products.multiply_grouped
        for name, (width, out) in self.features.items():
            rows = (self.num_experts, out, width // MXFP4.block_size)
            self.register_parameter(name, _frozen(torch.empty(*rows, MXFP4.block_size // 2, dtype=torch.uint8)))
            self.register_parameter(name + SCALES_SUFFIX, _frozen(torch.empty(rows, dtype=torch.uint8)))
            self.register_parameter(name + BIAS_SUFFIX, nn.Parameter(torch.empty(self.num_experts, out, dtype=dtype)))

    def bias(self, name: str) -> Tensor:
        """Return the biases of a projection, (E, out)."""
        return cast(Tensor, getattr(self, name + BIAS_SUFFIX))

    def scales(self, name: str) -> Tensor:
        """Return the scales of a projection's weights, (E, out, in / 32) uint8."""
        return cast(Tensor, getattr(self, name + SCALES_SUFFIX))

    def decode(self, name: str, experts: slice | Tensor) -> Tensor:
        """Decode the weights of some experts in a projection. The result has the shape (g, in, out)."""
        return self.decode_packed(name, *self.packed(name, experts))

    def packed(self, name: str, experts: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return the blocks (g, out, in / 32, 16) and the scales (g, out, in / 32) of some experts of a projection."""
        return getattr(self, name)[experts], self.scales(name)[experts]

    def decode_packed(self, name: str, blocks: Tensor, scales: Tensor) -> Tensor:
        """Decode blocks and scales of a projection.

        Shapes: blocks (g, out, in / 32, 16), scales (g, out, in / 32), result (g, in, out).
        """
        weights = self.new_weights(name, len(blocks))
        decode(blocks, scales, self.dtype, out=weights.transpose(1, 2))
        return weights

    def new_weights(self, name: str, count: int) -> Tensor:
        """Allocate the weights of `count` experts in a projection. The result has the shape (count, in, out)."""
        return torch.empty(count, *self.features[name], dtype=self.dtype, device=self.bias(name).device)

    def rounds(self, name: str) -> bool:
        """Return whether a pass rounds base + delta in a projection. A subclass with quantizers overrides this."""
        return False

    def weights(self, name: str, experts: slice | Tensor, factors: Factors | None) -> Tensor:
        """Return the weights of some experts, as a pass uses them. A subclass with quantizers overrides this.

        The result has the shape (g, in, out).

        Args:
            name: name of the projection.
            experts: the experts.
            factors: factors of the adapters of all experts, or None. They are merged only if `rounds` is true.
        """
        return self.decode(name, experts)

    def quantize_inputs(self, name: str, rows: Tensor) -> Tensor:
        """Return the inputs of a projection unchanged. A subclass with quantizers overrides this."""
        return rows

    @property
    def visits_all(self) -> bool:
        """Whether a forward pass also visits experts without tokens. A subclass with quantizers overrides this."""
        return False

    def observe(self, name: str, weights: Tensor, first: int) -> None:
        """Receive the weights that a forward pass uses. A subclass with quantizers overrides this."""

    def forward(
        self, states: Tensor, chosen: Tensor, shares: Tensor, factors: Mapping[str, Factors] | None = None
    ) -> Tensor:
        """Compute the output of the layer's experts, (T, H).

        Args:
            states: hidden states, (T, H).
            chosen: the experts of each token, (T, K).
            shares: factor for the output of each chosen expert, shape (T, K).
            factors: factors of the adapters, keyed by the name of the projection.
        """
        factors = factors or {}
        work = Pass(self, chosen, factors, may_gather=not torch.is_grad_enabled())
        biases = [self.bias(name) for name in EXPERT_WEIGHTS]
        trained = [tensor for each in factors.values() for tensor in (each.a, each.b)]
        rows, shares = self.quantize_inputs(GATE_UP, states).to(self.dtype), shares.to(self.dtype)
        held = _Hold.apply(work, rows, shares, *biases, *trained)
        return cast(Tensor, _Compute.apply(work, held, shares)).to(states.dtype)

    def gate(self, up: Tensor) -> Tensor:
        """Apply the activation to the output of the gate-up projection. It turns (n, 2 I) into (n, I)."""
        apply_gate: Any = GptOssExperts._apply_gate
        return cast(Tensor, apply_gate(self, up))


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    work: Pass


class _Hold(torch.autograd.Function):
    """Keeps the inputs of the experts. Its backward pass computes all gradients of the experts.

    It is separate from `_Compute`, which keeps nothing. Gradient checkpointing recomputes a layer only up to the last
    tensor that the layer keeps. `_Hold` keeps this tensor, and `_Compute` is not run again. So weights are decoded
    twice per step, not three times.
    """

    @staticmethod
    def forward(ctx: _Context, work: Pass, states: Tensor, shares: Tensor, *others: Tensor) -> Tensor:
        ctx.work = work
        ctx.save_for_backward(states, shares)
        return states.detach()

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, shares = ctx.saved_tensors
        with torch.autocast(states.device.type, enabled=False):
            return None, *ctx.work.backward(gradients[0], states, shares)


class _Compute(torch.autograd.Function):
    """Computes the output of the experts. Its backward pass gives the output's gradient to `_Hold`, unchanged."""

    @staticmethod
    def forward(ctx: FunctionCtx, work: Pass, held: Tensor, shares: Tensor) -> Tensor:
        with torch.autocast(held.device.type, enabled=False):  # experts compute in their own type
            return work.forward(held, shares)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[None, Tensor, None]:
        return None, gradients[0], None


def replace(model: nn.Module, dtype: torch.dtype, computes_in: torch.dtype | None = None) -> None:
    """Replace the experts of a gpt-oss model in place. The new experts are packed, and have no values yet.

    `dtype` and `computes_in` are those of `PackedExperts`.
    """
    for owner in list(model.modules()):
        for name, module in owner.named_children():
            if isinstance(module, GptOssExperts):
                setattr(owner, name, PackedExperts(cast(Any, model).config, dtype, computes_in))


def is_packed(model: nn.Module) -> bool:
    """Return whether the experts of a model are packed."""
    return any(isinstance(module, PackedExperts) for module in model.modules())


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
