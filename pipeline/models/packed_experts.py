"""The experts of a gpt-oss layer with weights that stay packed: MXFP4 blocks and scales, decoded while they are used.

The weights are frozen. They are decoded for a few experts at a time, in the forward pass and again in the backward
pass, and nothing as large as a stack of weights is kept between the two. Adapters (`Factors`) enter in one of two ways:
- Without quantizers, rows are multiplied by the factors: x W + s (x A) B.
- With quantizers, base + delta is rounded as the export rounds it: x round(W + s A B).

The gradients of A and B are s x' (g B') and s (x A)' g in both cases, for inputs x and gradients g of the outputs.
So the gradient of a whole weight is never computed. Rounding passes gradients straight through.

Shapes: T tokens, K experts per token, R = T K rows (one for each expert of each token, sorted by expert), E experts of
which a part has g experts and n rows, H hidden size, I intermediate size, r rank.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from pipeline.checkpoints.gpt_oss import BIAS_SUFFIX, DOWN, EXPERT_WEIGHTS, GATE_UP, SCALES_SUFFIX
from pipeline.models import expert_products
from pipeline.models.expert_products import Factors, Groups, Multiply
from pipeline.numerics.codec import decode
from pipeline.numerics.formats import MXFP4

DECODED_BYTES = {"cpu": 1, "cuda": 1 << 30}
"""Largest size of the weights of one projection that are decoded at once, but at least one expert.

A CPU decodes single experts, which stay in its caches. A GPU decodes all experts of a gpt-oss-20b layer at once.
"""


@dataclass(frozen=True)
class Part:
    """Some experts and the rows that belong to them.

    Attributes:
        experts: the experts.
        slots: for each row, its index in the flattened (T, K), (n).
        groups: says which rows belong to which of these experts.
        is_own: whether a row belongs to these experts, (n, 1), or None if all rows do.
    """

    experts: slice
    slots: Tensor
    groups: Groups
    is_own: Tensor | None = None


class PackedExperts(nn.Module):
    """Replaces transformers' GptOssExperts. Its frozen weights are packed.

    Blocks and scales are parameters, not buffers: FSDP2 shards only parameters, and DDP would broadcast buffers before
    every forward pass. Blocks have the name of the plain weights, under which PEFT looks for weights to adapt.

    Attributes:
        features: for each projection, the numbers of input and output features.
        multiply: function that multiplies rows by the weights of their experts.
    """

    is_transposed = True  # for PEFT: adapters are those of plain weights, (E, in, out)
    alpha, limit = 1.702, 7.0

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        """Create the parameters without values.

        Args:
            config: transformers' configuration of the model.
            dtype: type of the biases, and of the weights after decoding.
        """
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.num_experts: int = config.num_local_experts
        self.features = {GATE_UP: (hidden, 2 * inner), DOWN: (inner, hidden)}
        self.multiply: Multiply = expert_products.multiply_grouped
        for name, (width, out) in self.features.items():
            rows = (self.num_experts, out, width // MXFP4.block_size)
            self.register_parameter(name, _frozen(torch.empty(*rows, MXFP4.block_size // 2, dtype=torch.uint8)))
            self.register_parameter(name + SCALES_SUFFIX, _frozen(torch.empty(rows, dtype=torch.uint8)))
            self.register_parameter(name + BIAS_SUFFIX, nn.Parameter(torch.empty(self.num_experts, out, dtype=dtype)))

    @property
    def dtype(self) -> torch.dtype:
        """Type that the experts compute in."""
        return self.bias(GATE_UP).dtype

    def bias(self, name: str) -> Tensor:
        """Return the biases of a projection, (E, out)."""
        return cast(Tensor, getattr(self, name + BIAS_SUFFIX))

    def scales(self, name: str) -> Tensor:
        """Return the scales of a projection's weights, (E, out, in / 32) uint8."""
        return cast(Tensor, getattr(self, name + SCALES_SUFFIX))

    def decode(self, name: str, experts: slice) -> Tensor:
        """Decode some experts' weights of a projection, (g, in, out)."""
        return self.decode_packed(name, getattr(self, name)[experts], self.scales(name)[experts])

    def decode_packed(self, name: str, blocks: Tensor, scales: Tensor) -> Tensor:
        """Decode blocks (g, out, in / 32, 16) and scales (g, out, in / 32) of a projection, to (g, in, out)."""
        weights = self.new_weights(name, len(blocks))
        decode(blocks, scales, self.dtype, out=weights.transpose(1, 2))
        return weights

    def new_weights(self, name: str, count: int) -> Tensor:
        """Allocate the weights of `count` experts of a projection, (count, in, out)."""
        return torch.empty(count, *self.features[name], dtype=self.dtype, device=self.bias(name).device)

    def rounds(self, name: str) -> bool:
        """Return whether base + delta of a projection is rounded. A subclass with quantizers overrides this."""
        return False

    def weights(self, name: str, experts: slice, factors: Factors | None) -> Tensor:
        """Return the weights that rows are multiplied by, (g, in, out). A subclass with quantizers overrides this.

        Args:
            name: name of the projection.
            experts: the experts.
            factors: factors of the adapters of all experts, which only `rounds` merges, or None.
        """
        return self.decode(name, experts)

    def quantize_inputs(self, name: str, rows: Tensor) -> Tensor:
        """Return the inputs of a projection as they are multiplied. A subclass with quantizers overrides this."""
        return rows

    @property
    def visits_all(self) -> bool:
        """Whether a forward pass also visits experts without tokens. A subclass with quantizers overrides this."""
        return False

    def observe(self, name: str, weights: Tensor, first: int) -> None:
        """See the weights that a forward pass uses. A subclass with quantizers overrides this."""

    def forward(
        self, states: Tensor, chosen: Tensor, shares: Tensor, factors: Mapping[str, Factors] | None = None
    ) -> Tensor:
        """Compute the output of the layer's experts, (T, H).

        Args:
            states: hidden states, (T, H).
            chosen: the experts of each token, (T, K).
            shares: factor of each chosen expert's output, (T, K).
            factors: factors of the adapters, keyed by the name of the projection.
        """
        factors = factors or {}
        work = _Work(self, chosen, factors)
        biases = [self.bias(name) for name in EXPERT_WEIGHTS]
        trained = [tensor for each in factors.values() for tensor in (each.a, each.b)]
        rows, shares = self.quantize_inputs(GATE_UP, states).to(self.dtype), shares.to(self.dtype)
        held = _Hold.apply(work, rows, shares, *biases, *trained)
        return cast(Tensor, _Compute.apply(work, held, shares)).to(states.dtype)

    def gate(self, up: Tensor) -> Tensor:
        """Apply the activation to the output of the gate-up projection, (n, 2 I) -> (n, I)."""
        apply_gate: Any = GptOssExperts._apply_gate
        return cast(Tensor, apply_gate(self, up))


class _Hold(torch.autograd.Function):
    """Keeps the inputs of the experts, and computes all their gradients.

    It is separate from `_Compute`, which keeps nothing. Gradient checkpointing ends the recomputation of a layer at the
    last tensor that is kept, which is here. So weights are decoded twice per step, not three times.
    """

    @staticmethod
    def forward(ctx: Any, work: "_Work", states: Tensor, shares: Tensor, *others: Tensor) -> Tensor:
        ctx.work = work
        ctx.save_for_backward(states, shares)
        return states.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, shares = ctx.saved_tensors
        with torch.autocast(states.device.type, enabled=False):
            return None, *ctx.work.backward(gradients[0], states, shares)


class _Compute(torch.autograd.Function):
    """Computes the output of the experts. Its gradient reaches `_Hold` in place of the gradient of the held states."""

    @staticmethod
    def forward(ctx: Any, work: "_Work", held: Tensor, shares: Tensor) -> Tensor:
        with torch.autocast(held.device.type, enabled=False):  # experts compute in the type of their biases
            return work.forward(held, shares)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        return None, gradients[0], None


class _Work:
    """The forward and the backward pass of one batch through the experts of a layer."""

    def __init__(self, experts: PackedExperts, chosen: Tensor, factors: Mapping[str, Factors]) -> None:
        self._experts = experts
        self._chosen = chosen
        self._factors = {name: _Adapter(each, experts.dtype) for name, each in factors.items()}

    def forward(self, states: Tensor, shares: Tensor) -> Tensor:
        """Compute the output, (T, H)."""
        result = states.new_zeros(self._chosen.numel(), states.shape[1])
        for part in self._parts(visits_all=self._experts.visits_all):
            up = self._project(GATE_UP, part, states[self._tokens(part)])
            inner = self._experts.quantize_inputs(DOWN, self._experts.gate(up))
            down = self._project(DOWN, part, inner)
            _put(result, part, down * shares.flatten()[part.slots].unsqueeze(-1))
        return result.unflatten(0, self._chosen.shape).sum(dim=1)

    def backward(self, gradient: Tensor, states: Tensor, shares: Tensor) -> list[Tensor | None]:
        """Compute the gradients of the states, the shares, the biases and the factors."""
        grads = _Gradients(self._experts, self._chosen, states, shares, self._factors)
        for part in self._parts():
            self._add_gradients(grads, part, gradient, states, shares)
        return grads.results(self._chosen.shape)

    def _add_gradients(self, grads: "_Gradients", part: Part, gradient: Tensor, states: Tensor, shares: Tensor) -> None:
        tokens, share = self._tokens(part), shares.flatten()[part.slots].unsqueeze(-1)
        rows, of_output = states[tokens], gradient[tokens]
        weights = self._weights(GATE_UP, part)
        with torch.enable_grad():
            up = self._apply(GATE_UP, part, rows, weights).requires_grad_()
            gated = self._experts.gate(up)
        inner = self._experts.quantize_inputs(DOWN, gated.detach())
        # The output before the share is inner W + bias, so its product with the gradient needs no forward product.
        of_inner = self._apply_transposed(DOWN, part, of_output, self._weights(DOWN, part))
        bias = self._experts.bias(DOWN)[part.experts][part.groups.experts]
        of_share = (of_inner.float() * inner.float()).sum(1) + (of_output.float() * bias.float()).sum(1)
        of_down = of_output * share
        (of_up,) = torch.autograd.grad(gated, up, (of_inner * share).to(gated.dtype))
        grads.add(DOWN, part, inner, of_down)
        grads.add(GATE_UP, part, rows, of_up)
        grads.put(part, self._apply_transposed(GATE_UP, part, of_up, weights), of_share)

    def _parts(self, *, visits_all: bool = False) -> Iterator[Part]:
        """Split the experts into parts that are decoded at once.

        Parts without rows are left out unless `visits_all`.
        """
        chosen, slots = self._chosen.flatten().sort(stable=True)
        numbers = torch.arange(self._experts.num_experts, device=chosen.device)
        ends = torch.searchsorted(chosen, numbers, right=True, out_int32=True)
        size = self._experts.dtype.itemsize * max(width * out for width, out in self._experts.features.values())
        count = max(1, DECODED_BYTES.get(chosen.device.type, DECODED_BYTES["cuda"]) // size)
        if count >= len(ends):
            yield Part(slice(0, len(ends)), slots, Groups(chosen, ends))
        elif chosen.device.type == "cpu" or self._experts.multiply is not expert_products.multiply_grouped:
            yield from _slices(chosen, slots, ends, count, visits_all=visits_all)
        else:
            yield from _rolled(chosen, slots, ends, count)

    def _tokens(self, part: Part) -> Tensor:
        return part.slots // self._chosen.shape[1]

    def _weights(self, name: str, part: Part) -> Tensor:
        adapter = self._factors.get(name)
        return self._experts.weights(name, part.experts, None if adapter is None else adapter.factors)

    def _project(self, name: str, part: Part, rows: Tensor) -> Tensor:
        weights = self._weights(name, part)
        self._experts.observe(name, weights, part.experts.start)
        return self._apply(name, part, rows, weights)

    @torch.no_grad()
    def _apply(self, name: str, part: Part, rows: Tensor, weights: Tensor) -> Tensor:
        """Multiply rows by the weights and by the factors, and add the biases: (n, in) -> (n, out)."""
        result = self._multiply(rows, weights, part)
        if (adapter := self._thin(name)) is not None:
            a, b = adapter.of(part)
            result.add_(self._multiply(self._multiply(rows, a, part) * adapter.factors.scaling, b, part))
        return result.add_(self._experts.bias(name)[part.experts][part.groups.experts])

    def _apply_transposed(self, name: str, part: Part, gradient: Tensor, weights: Tensor) -> Tensor:
        """Compute the gradient of a projection's inputs: (n, out) -> (n, in)."""
        result = self._multiply(gradient, weights.transpose(1, 2), part)
        if (adapter := self._thin(name)) is not None:
            a, b = (factor.transpose(1, 2) for factor in adapter.of(part))
            result.add_(self._multiply(self._multiply(gradient, b, part) * adapter.factors.scaling, a, part))
        return result

    def _thin(self, name: str) -> "_Adapter | None":
        """Return the adapter if rows are multiplied by its factors, because the weights do not contain it."""
        return None if self._experts.rounds(name) else self._factors.get(name)

    def _multiply(self, rows: Tensor, weights: Tensor, part: Part) -> Tensor:
        return _multiply(self._experts, rows, weights, part)


class _Adapter:
    """The factors of a stack's adapter, and copies of them for products with rows."""

    def __init__(self, factors: Factors, dtype: torch.dtype) -> None:
        self.factors = Factors(factors.a.detach(), factors.b.detach(), factors.scaling)
        self.a, self.b = expert_products.aligned(self.factors, dtype)

    def of(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return A (g, in, r) and B (g, r, out) of some experts. Zeros may be appended to r."""
        return self.a[part.experts], self.b[part.experts]


class _Gradients:
    """Collects the gradients of one backward pass, part by part."""

    def __init__(
        self,
        experts: PackedExperts,
        chosen: Tensor,
        states: Tensor,
        shares: Tensor,
        adapters: Mapping[str, _Adapter],
    ) -> None:
        self._experts, self._adapters = experts, adapters
        self._states = states.new_zeros(chosen.numel(), states.shape[1])
        self._shares = torch.zeros_like(shares).flatten()
        self._biases = {
            name: torch.zeros_like(experts.bias(name)) for name in EXPERT_WEIGHTS if experts.bias(name).requires_grad
        }
        self._factors = {
            name: (torch.zeros_like(each.factors.a), torch.zeros_like(each.factors.b))
            for name, each in adapters.items()
        }

    def put(self, part: Part, of_rows: Tensor, of_shares: Tensor) -> None:
        """Store the gradients of a part's rows (n, H) and shares (n)."""
        _put(self._states, part, of_rows)
        _put(self._shares, part, of_shares.to(self._shares.dtype))

    def add(self, name: str, part: Part, rows: Tensor, gradient: Tensor) -> None:
        """Add a projection's gradients of the biases and factors, from its inputs (n, in) and (n, out) gradients."""
        if part.is_own is not None:
            gradient = torch.where(part.is_own, gradient, 0)
        if name in self._biases:
            self._biases[name][part.experts].index_add_(0, part.groups.experts, gradient)
        if name in self._adapters:
            self._add_factors(name, part, rows, gradient)

    def results(self, shape: torch.Size) -> list[Tensor | None]:
        """Return the gradients of the states, the shares, the biases and the factors. `shape` is that of the shares."""
        of_states = self._states.unflatten(0, shape).sum(dim=1)
        factors = [each for pair in self._factors.values() for each in pair]
        return [of_states, self._shares.view(shape), *map(self._biases.get, EXPERT_WEIGHTS), *factors]

    def _add_factors(self, name: str, part: Part, rows: Tensor, gradient: Tensor) -> None:
        adapter = self._adapters[name]
        a, b = adapter.of(part)
        narrow = _multiply(self._experts, rows, a, part)
        narrow_gradient = _multiply(self._experts, gradient, b.transpose(1, 2), part)
        scaling, rank = adapter.factors.scaling, adapter.factors.a.shape[2]
        of_a, of_b = (factors[part.experts] for factors in self._factors[name])
        of_a.copy_(_sum_products(self._experts, rows, narrow_gradient, part)[..., :rank]).mul_(scaling)
        of_b.copy_(_sum_products(self._experts, narrow, gradient, part)[:, :rank]).mul_(scaling)


def _multiply(experts: PackedExperts, rows: Tensor, weights: Tensor, part: Part) -> Tensor:
    if len(weights) == 1:
        return rows @ weights[0]
    return experts.multiply(rows, weights, part.groups)


def _sum_products(experts: PackedExperts, one: Tensor, other: Tensor, part: Part) -> Tensor:
    """Sum the products of two rows over the rows of each expert: (n, p), (n, q) -> (g, p, q)."""
    if len(part.groups.ends) == 1:
        return (one.t() @ other).unsqueeze(0)
    if experts.multiply is expert_products.multiply_grouped:
        return torch.nn.functional.grouped_mm(one.t(), other, offs=part.groups.ends)
    pairs = zip(one.split(part.groups.sizes), other.split(part.groups.sizes), strict=True)
    return torch.stack([rows.t() @ others for rows, others in pairs])


def _put(result: Tensor, part: Part, rows: Tensor) -> None:
    """Write the rows of a part to their slots."""
    if part.is_own is not None:
        rows = torch.where(part.is_own.view(-1, *[1] * (rows.dim() - 1)), rows, result[part.slots])
    result[part.slots] = rows


def _slices(chosen: Tensor, slots: Tensor, ends: Tensor, count: int, *, visits_all: bool) -> Iterator[Part]:
    """Cut the rows into parts of `count` experts. The host reads where to cut, for which it waits on a GPU."""
    bounds = [0, *ends.tolist()]
    for first in range(0, len(ends), count):
        last = min(first + count, len(ends))
        rows = slice(bounds[first], bounds[last])
        if visits_all or rows.stop > rows.start:
            groups = Groups(chosen[rows] - first, ends[first:last] - bounds[first])
            yield Part(slice(first, last), slots[rows], groups)


def _rolled(chosen: Tensor, slots: Tensor, ends: Tensor, count: int) -> Iterator[Part]:
    """Make parts of `count` experts without waiting for a GPU.

    The host does not know how many rows a part has. So every part gets all rows, rolled so that its own come first. A
    grouped product skips the rows after the last end.
    """
    place = torch.arange(len(slots), device=slots.device)
    for first in range(0, len(ends), count):
        last = min(first + count, len(ends))
        start = ends[first - 1] if first else ends.new_zeros(())
        rolled = (place + start) % len(slots)
        own = ends[first:last] - start
        numbers = (chosen[rolled] - first).clamp(0, last - first - 1)
        yield Part(slice(first, last), slots[rolled], Groups(numbers, own), (place < own[-1]).unsqueeze(-1))


def replace(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the experts of a gpt-oss model by packed ones without values, in place."""
    for owner in list(model.modules()):
        for name, module in owner.named_children():
            if isinstance(module, GptOssExperts):
                setattr(owner, name, PackedExperts(cast(Any, model).config, dtype))


def is_packed(model: nn.Module) -> bool:
    """Return whether the experts of a model are packed."""
    return any(isinstance(module, PackedExperts) for module in model.modules())


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
