"""Multiply each token by the weights of its experts, and by the low-rank factors of their adapters.

The adapter of an expert adds the delta s A B to the weight W. A forward pass can multiply by the sum W + s A B, as PEFT
does, or by the factors: x W + s (x A) B. The first way stores the sum and its gradient, both as large as W. The second
way stores neither. The products with A and B are cheap: at rank 8 and width 2880, they need less than 1 % of the
operations of x W.

Shapes: T tokens, K experts per token, R rows, E experts, r rank. Each token has one row for each of its experts, so
R = T K. Rows are sorted by expert.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.checkpoints.gpt_oss import BIAS_SUFFIX, DOWN, GATE_UP
from pipeline.models.autocast import compute_dtype
from pipeline.numerics import low_rank

_STRIDE_BYTES = 16  # torch.nn.functional.grouped_mm takes only strides that are multiples of this


@dataclass(frozen=True)
class Factors:
    """The factors of the adapters of one expert stack.

    Attributes:
        a: the matrix A of each expert, shape (E, in, r).
        b: the matrix B of each expert, shape (E, r, out).
        scaling: the number s in s A B.
    """

    a: Tensor
    b: Tensor
    scaling: float

    def merge(self, base: Tensor, experts: slice | Tensor) -> Tensor:
        """Return base + delta of some experts, in the type of `base`. Shape: (g, in, out). There are no gradients."""
        return low_rank.merge(base, self.a[experts], self.b[experts], self.scaling)


@dataclass(frozen=True)
class Groups:
    """Says which rows belong to which expert. Rows are sorted by expert.

    Attributes:
        experts: the expert of each row, in ascending order, shape (R).
        ends: the index after the last row of each expert, shape (E), int32.
    """

    experts: Tensor
    ends: Tensor

    @cached_property
    def sizes(self) -> list[int]:
        """Number of rows of each expert. On a GPU, the first access waits for the GPU."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()


def sort_by_expert(chosen: Tensor, num_experts: int) -> tuple[Groups, Tensor]:
    """Make one row for each expert of each token, and sort the rows by expert.

    Args:
        chosen: the experts of each token, (T, K).
        num_experts: number of experts in the layer.

    Returns:
        The groups of the rows, and the index of each row in the flattened `chosen`. The shape of the index is (R).
    """
    experts, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(num_experts, device=chosen.device)
    return Groups(experts, torch.searchsorted(experts, numbers, right=True, out_int32=True)), order


Multiply = Callable[[Tensor, Tensor, Groups], Tensor]
"""A function that multiplies each row by the weights of its expert. Shapes: rows (R, in), weights (E, in, out)."""


def multiply_grouped(rows: Tensor, weights: Tensor, groups: Groups) -> Tensor:
    """Multiply with torch's grouped product."""
    return functional.grouped_mm(rows, weights, offs=groups.ends)


def multiply_in_loop(rows: Tensor, weights: Tensor, groups: Groups) -> Tensor:
    """Multiply with one product for each expert that has rows."""
    pairs = zip(rows.split(groups.sizes), weights.unbind(), strict=True)
    return torch.cat([chunk @ weight for chunk, weight in pairs if len(chunk)])


def multiply_batched(rows: Tensor, weights: Tensor, groups: Groups) -> Tensor:
    """Multiply with one batched product. It needs a copy of an expert's weights for each row of the expert."""
    return torch.bmm(rows.unsqueeze(1), weights[groups.experts]).squeeze(1)


def forward(
    experts: nn.Module,
    states: Tensor,
    chosen: Tensor,
    shares: Tensor,
    factors: Mapping[str, Factors],
    multiply: Multiply,
) -> Tensor:
    """Compute the output of a layer's experts, like transformers' `grouped_mm_experts_forward`.

    Args:
        experts: transformers' module of the experts.
        states: hidden states, (T, hidden).
        chosen: the experts of each token, (T, K).
        shares: factor for the output of each chosen expert, shape (T, K).
        factors: factors of the adapters, keyed by the name of the adapted weights.
        multiply: function that computes the products.
    """
    module: Any = experts
    groups, order = sort_by_expert(chosen, module.num_experts)

    def project(name: str, rows: Tensor) -> Tensor:
        return _project(experts, name, rows, factors.get(name), groups=groups, multiply=multiply)

    rows = project(DOWN, module._apply_gate(project(GATE_UP, states[order // chosen.shape[1]])))
    rows = rows * shares.flatten()[order].unsqueeze(-1)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    return rows[position].unflatten(0, chosen.shape).sum(dim=1).to(states.dtype)


def _project(
    experts: nn.Module, name: str, rows: Tensor, factors: Factors | None, *, groups: Groups, multiply: Multiply
) -> Tensor:
    """Multiply rows by a stack of weights and by the factors of its adapters, and add the biases.

    The products have the type that the forward pass computes in.
    """
    stored = getattr(experts, name)
    weights = stored.to(compute_dtype(stored))
    rows = rows.to(weights.dtype)
    result = multiply(rows, weights, groups)
    if factors is not None:
        a, b = align(factors, weights.dtype)
        result.add_(multiply(multiply(rows, a, groups) * factors.scaling, b, groups))
    return result.add_(getattr(experts, name + BIAS_SUFFIX)[groups.experts])


def align(factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cast the factors to `dtype`. If rows of r values are not aligned, append zeros to them."""
    more = -factors.b.shape[1] % (_STRIDE_BYTES // dtype.itemsize)
    a, b = factors.a.to(dtype).transpose(1, 2), factors.b.to(dtype)
    if more:
        a, b = functional.pad(a, (0, 0, 0, more)), functional.pad(b, (0, 0, 0, more))
    return a.contiguous().transpose(1, 2), b.contiguous()
