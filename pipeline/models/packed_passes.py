"""The forward and the backward pass through packed experts, a few of them at a time.

A projection has inputs x, and its outputs have the gradient g. The gradient of A is s x' (g B'). The gradient of B is
s (x A)' g. Both formulas hold whether rows are multiplied by the factors or by rounded base + delta. So the gradient
of a whole weight is never computed.

Shapes: T tokens, K experts per token, E experts, H hidden size, I intermediate size, r rank. Each token has one row for
each of its experts, and rows are sorted by expert. A part has g experts and n rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.checkpoints.gpt_oss import DOWN, EXPERT_WEIGHTS, GATE_UP
from pipeline.models import expert_products
from pipeline.models.expert_products import Factors, Groups, Multiply

DECODED_BYTES = {"cpu": 1, "cuda": 1 << 30}
"""Type of device -> maximum number of bytes that are decoded at once. The maximum applies to each projection.

At least one expert is always decoded. A CPU decodes single experts, which stay in its caches. A GPU decodes all experts
of a gpt-oss-20b layer at once.
"""

_ALIGNED_COLUMNS = 8  # torch.nn.functional.grouped_mm takes only rows whose size is a multiple of 16 bytes


class Experts(Protocol):
    """A pass uses these members of `packed_experts.PackedExperts`, which documents them."""

    num_experts: int
    features: dict[str, tuple[int, int]]
    multiply: Multiply

    dtype: torch.dtype

    @property
    def visits_all(self) -> bool: ...
    def bias(self, name: str) -> Tensor: ...
    def rounds(self, name: str) -> bool: ...
    def weights(self, name: str, experts: slice | Tensor, factors: Factors | None) -> Tensor: ...
    def quantize_inputs(self, name: str, rows: Tensor) -> Tensor: ...
    def gate(self, up: Tensor) -> Tensor: ...
    def observe(self, name: str, weights: Tensor, first: int) -> None: ...


@dataclass(frozen=True)
class Part:
    """Some experts and the rows that belong to them.

    Attributes:
        experts: the numbers of the experts, as a slice or as a tensor of shape (g). A tensor may contain a number more
            than once.
        slots: for each row, its index among the T * K rows before sorting, shape (n).
        groups: says which rows belong to which of these experts.
        is_own: whether each row belongs to these experts, shape (n, 1). None if all rows do.
    """

    experts: slice | Tensor
    slots: Tensor
    groups: Groups
    is_own: Tensor | None = None

    @property
    def first(self) -> int:
        """Number of the first expert, or 0 if `experts` is a tensor."""
        return self.experts.start if isinstance(self.experts, slice) else 0


class Pass:
    """The passes of one batch through the experts of a layer."""

    def __init__(self, experts: Experts, chosen: Tensor, factors: Mapping[str, Factors], *, may_gather: bool) -> None:
        """Prepare the passes.

        Args:
            experts: the experts.
            chosen: the experts of each token, (T, K).
            factors: factors of the adapters, keyed by the name of the projection.
            may_gather: whether a batch of few tokens may decode only its own experts. This must be false if a backward
                pass follows.
        """
        self._experts = experts
        self._chosen = chosen
        self._may_gather = may_gather
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
        # The gradient of a share is (inner W + bias) . of_output. This equals inner . of_inner + bias . of_output, so
        # inner W is not computed.
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
        groups, slots = expert_products.sort_by_expert(self._chosen, self._experts.num_experts)
        chosen, ends = groups.experts, groups.ends
        size = self._experts.dtype.itemsize * max(width * out for width, out in self._experts.features.values())
        count = max(1, DECODED_BYTES.get(chosen.device.type, DECODED_BYTES["cuda"]) // size)
        if count > 1 and len(slots) < len(ends) and self._may_gather and not visits_all:
            yield _gathered(chosen, slots)
        elif count >= len(ends):
            yield Part(slice(0, len(ends)), slots, groups)
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
        self._experts.observe(name, weights, part.first)
        return self._apply(name, part, rows, weights)

    @torch.no_grad()
    def _apply(self, name: str, part: Part, rows: Tensor, weights: Tensor) -> Tensor:
        """Multiply rows by the weights and by the factors, and add the biases: (n, in) -> (n, out)."""
        result = _multiply(self._experts, rows, weights, part)
        if (adapter := self._thin(name)) is not None:
            a, b = adapter.of(part)
            narrow = _multiply(self._experts, rows, a, part) * adapter.factors.scaling
            result.add_(_multiply(self._experts, narrow, b, part))
        return result.add_(self._experts.bias(name)[part.experts][part.groups.experts])

    def _apply_transposed(self, name: str, part: Part, gradient: Tensor, weights: Tensor) -> Tensor:
        """Compute the gradient of a projection's inputs: (n, out) -> (n, in)."""
        result = _multiply(self._experts, gradient, weights.transpose(1, 2), part)
        if (adapter := self._thin(name)) is not None:
            a, b = (factor.transpose(1, 2) for factor in adapter.of(part))
            narrow = _multiply(self._experts, gradient, b, part) * adapter.factors.scaling
            result.add_(_multiply(self._experts, narrow, a, part))
        return result

    def _thin(self, name: str) -> "_Adapter | None":
        """Return the adapter that is not merged into the weights, or None. Rows are multiplied by its factors."""
        return None if self._experts.rounds(name) else self._factors.get(name)


class _Adapter:
    """The factors of a stack's adapter. `a` and `b` are copies that can be multiplied with rows."""

    def __init__(self, factors: Factors, dtype: torch.dtype) -> None:
        self.factors = Factors(factors.a.detach(), factors.b.detach(), factors.scaling)
        self.a, self.b = expert_products.align(self.factors, dtype)

    def of(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return A (g, in, r) and B (g, r, out) of some experts. Zeros may be appended to r."""
        return self.a[part.experts], self.b[part.experts]


class _Gradients:
    """Collects the gradients of one backward pass, part by part."""

    def __init__(
        self,
        experts: Experts,
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
        """Store the gradients of a part's rows and shares. Shapes: rows (n, H), shares (n)."""
        _put(self._states, part, of_rows)
        _put(self._shares, part, of_shares.to(self._shares.dtype))

    def add(self, name: str, part: Part, rows: Tensor, gradient: Tensor) -> None:
        """Add the gradients of a projection's biases and factors.

        `rows` (n, in) are the inputs of the projection. `gradient` (n, out) is the gradient of its outputs.
        """
        if part.is_own is not None:
            gradient = torch.where(part.is_own, gradient, 0)
        if name in self._biases:
            # A product with ones sums in FP32 and in a fixed order, also if the rows are BF16.
            ones = gradient.new_ones(len(gradient), _ALIGNED_COLUMNS)
            self._biases[name][part.experts].copy_(_sum_products(self._experts, ones, gradient, part)[:, 0])
        if name in self._adapters:
            self._add_factors(name, part, rows, gradient)

    def results(self, shape: torch.Size) -> list[Tensor | None]:
        """Return the gradients of the states, the shares, the biases and the factors. `shape` is (T, K)."""
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


def _multiply(experts: Experts, rows: Tensor, weights: Tensor, part: Part) -> Tensor:
    if len(weights) == 1:
        return rows @ weights[0]
    return experts.multiply(rows, weights, part.groups)


def _sum_products(experts: Experts, one: Tensor, other: Tensor, part: Part) -> Tensor:
    """For each expert, compute `one.T @ other` over the rows of this expert.

    Shapes: (n, p) and (n, q) -> (g, p, q).
    """
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
    """Cut the rows into parts of `count` experts. On a GPU, the host waits for the positions of the cuts."""
    bounds = [0, *ends.tolist()]
    for first in range(0, len(ends), count):
        last = min(first + count, len(ends))
        rows = slice(bounds[first], bounds[last])
        if visits_all or rows.stop > rows.start:
            groups = Groups(chosen[rows] - first, ends[first:last] - bounds[first])
            yield Part(slice(first, last), slots[rows], groups)


def _gathered(chosen: Tensor, slots: Tensor) -> Part:
    """Make one part in which every row has its own expert. So only chosen experts are decoded, as in generation."""
    rows = torch.arange(len(slots), device=slots.device)
    return Part(chosen, slots, Groups(rows, (rows + 1).int()))


def _rolled(chosen: Tensor, slots: Tensor, ends: Tensor, count: int) -> Iterator[Part]:
    """Make parts of `count` experts without waiting for a GPU.

    The host does not know how many rows a part has. So every part gets all rows. They are rolled so that the
    part's own rows come first. A grouped product skips the rows after the last end.
    """
    place = torch.arange(len(slots), device=slots.device)
    for first in range(0, len(ends), count):
        last = min(first + count, len(ends))
        start = ends[first - 1] if first else ends.new_zeros(())
        rolled = (place + start) % len(slots)
        own = ends[first:last] - start
        numbers = (chosen[rolled] - first).clamp(0, last - first - 1)
        yield Part(slice(first, last), slots[rolled], Groups(numbers, own), (place < own[-1]).unsqueeze(-1))
