"""Rounds stacks of expert weights with GPTQ (Frantar et al. 2022, arXiv:2210.17323), and collects their Hessians.

GPTQ rounds one input column after the other. It moves the columns that are still to come, so that they compensate for
the error of the layer's output. This module computes the same weights from one Cholesky factor, without the inverse of
the Hessian. With H = L Lᵀ and the columns in reverse order, the squared error of the output is |Lᵀ e|², where e is the
error of each weight. Row r of Lᵀ e has the errors of r and of the columns before it. So column r is rounded after these
columns, at the target

    w_r + sum over the earlier columns s of e_s * L[s, r] / L[r, r].

This is the algorithm LDLQ. Chee et al. (2023, arXiv:2307.13304) prove that it equals GPTQ. The factor needs a quarter
of the arithmetic of GPTQ's, and there is no inverse that may fail to be positive definite.

The sweep halves its columns again and again. After the later half is rounded, one matrix product adds its errors to the
targets of the earlier half. These are GPTQ's lazy updates.

The scales of all blocks are fixed before the sweep, and each value is rounded to the nearest value of its block. The
result lies on the grid, and rounding it again by the scale rule that chose its scales changes nothing:

- e8m0: if the rule now chooses a smaller scale, the largest magnitude of the block is at most 3 * scale, and the grid
  of the smaller scale has all values of the block.
- e4m3 and the rules `nearest`, `ceil` and `floor`: the largest value of a block keeps its nearest rounding, 6 * scale.
  If it were 4 * scale, the rule would now choose another scale, whose grid lacks some of the values.
- e4m3 and the rule `mse`: one of its two candidates is the scale, or the scale divided by 2, 4 or 8.

For e4m3 scales that the caller gives, this holds for the rule `mse` only. With e4m3, it does not hold for a block whose
scale is so close to the smallest one, 2^-9, that e4m3 lacks the scale's fractions.

Legend: E = experts, in = input dimension, out = output dimension, nb = blocks per row, n = experts of a chunk,
k = columns of a leaf.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.numerics import codec, kernels, scales, slabs
from pipeline.numerics.formats import E4M3_LARGEST, E8M0_LARGEST, BlockFormat, ScaleType
from pipeline.numerics.scales import Divisor

_LEAF = 32
"""Columns that the sweep rounds one by one, between two matrix products."""

_CHUNK_BYTES = 8 << 30
"""Temporaries of a chunk of experts on a GPU."""

_CHUNK_BYTES_ON_CPU = 1 << 20
"""Temporaries of a chunk of experts on a CPU. Each expert of gpt-oss takes more, and is a chunk by itself."""


@contextmanager
def _exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32, even if torch is set to multiply them in TF32 or BF16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class HessianError(ValueError):
    """GPTQ cannot use a Hessian.

    Attributes:
        expert: index of its expert in the stack.
        problem: what is wrong with the Hessian, as the end of a sentence.
        is_finite: whether the Hessian has neither NaN nor Inf. More damping may then help.
    """

    def __init__(self, expert: int, problem: str, *, is_finite: bool) -> None:
        super().__init__(f"the Hessian of expert {expert} {problem}")
        self.expert, self.problem, self.is_finite = expert, problem, is_finite


class Hessians:
    """The mean of x xᵀ over the tokens x of each expert. A factor in front of it would not change GPTQ's result.

    Means keep their size when tokens are added. The sum of a batch is complete before it is added to the mean, so
    float32 loses little over many batches. Adding takes 4 in^2 bytes of temporaries, besides the tokens in float32.

    Attributes:
        means: shape (E, in, in), float32. Zero for an expert without tokens. It takes 4 E in^2 bytes.
        tokens: number of tokens of each expert.
    """

    def __init__(self, experts: int, inputs: int, device: torch.device | str = "cpu") -> None:
        self.means = torch.zeros(experts, inputs, inputs, device=device)
        self.tokens = [0] * experts

    @torch.no_grad()
    @_exact_products()
    def add(self, expert: int, tokens: Tensor) -> None:
        """Add the inputs of an expert: shape (tokens, in), any floating type."""
        if len(tokens) == 0:
            return
        total = self.tokens[expert] + len(tokens)
        exact = tokens.float()
        self.means[expert].lerp_((exact.mT @ exact).div_(len(tokens)), len(tokens) / total)
        self.tokens[expert] = total

    def with_too_few_tokens(self, per_input: float) -> list[int]:
        """List the experts that have fewer than `per_input` tokens per input dimension. GPTQ would overfit them."""
        least = per_input * self.means.shape[-1]
        return [expert for expert, count in enumerate(self.tokens) if count < least]


@torch.no_grad()
@_exact_products()
def round_gptq(
    values: Tensor,
    hessians: Tensor,
    block_format: BlockFormat,
    *,
    stored: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    importance: Tensor | None = None,
    damping: float = 0.01,
    act_order: bool = True,
    experts_at_once: int | None = None,
) -> Tensor:
    """Round the weights of a stack of experts. The result has the shape, type and memory order of `values`.

    Args:
        values: shape (E, out, in), float32 or bfloat16, any strides. Blocks run along the last dimension.
        hessians: shape (E, in, in), symmetric: the sum of x xᵀ over the expert's tokens x, times any factor. The sweep
            computes in their type, float32 or float64.
        block_format: format of the result, possibly with another scale rule.
        stored: scales of the blocks (E, out, nb), as `codec.encode` returns them. None: the format's rule chooses them.
        tensor_scale: result of `codec.tensor_scale`, (E). Required if `stored` is e4m3. None computes it from `values`.
        importance: weights of the rule `mse`; see `codec.encode`.
        damping: number that is added to the diagonal of each Hessian, as a fraction of the mean of the diagonal.
        act_order: whether to round the columns with the largest diagonal first. Otherwise they are rounded in order.
        experts_at_once: number of experts of a chunk. None means 1 MiB of temporaries on a CPU and 8 GiB on a GPU, and
            at least one expert. On a CPU, the number does not change a bit of the result.

    Raises:
        HessianError: a Hessian has NaN or Inf, or is not positive definite after damping.
        CodecError: a weight is NaN or Inf, or the block size does not divide `in`.
        ValueError: shapes or types do not fit.
    """
    _raise_if_unfit(values, hessians, block_format, stored, tensor_scale)
    result = torch.empty_like(values)
    for experts in _chunks(values, hessians, experts_at_once):
        _raise_if_not_finite(part := values[experts], experts.start)
        order, factors = _factorize(hessians[experts], damping, act_order, experts.start)
        grid = _make_grid(part, block_format, *_take(experts, stored, tensor_scale, importance))
        _Sweep(part, result[experts], grid, order, factors).run()
    return result


class _Columns(NamedTuple):
    """What rounding needs to know about k columns.

    Attributes:
        divisor: fields of the shape (n, k, out).
        is_kept: whether a value keeps its nearest rounding, (n, k, out) bool. None if no value does.
    """

    divisor: Divisor
    is_kept: Tensor | None

    def round(self, i: int, targets: Tensor, exact: Tensor) -> Tensor:
        """Round column i: targets and weights of the shape (n, 1, out)."""
        column = slice(i, i + 1)
        if self.is_kept is not None:
            targets = torch.where(self.is_kept[:, column], exact, targets)
        inverse, significand, scale = self.divisor.inverse, self.divisor.significand, self.divisor.scale
        part = None if significand is None else significand[:, column]
        return kernels.round_blocks(targets.unsqueeze(2), inverse[:, column], part, scale[:, column]).squeeze(2)


class _Grid(NamedTuple):
    """The grids of a chunk of experts.

    Attributes:
        block_format: format and scale rule.
        stored: bytes of the scales, (n, nb, out) uint8.
        unit: tensor scales, (n). None for e8m0.
        peaks: position in its block of the value that keeps its nearest rounding, (n, nb, out). None if no value does.
    """

    block_format: BlockFormat
    stored: Tensor
    unit: Tensor | None
    peaks: Tensor | None

    def columns(self, experts: Tensor, order: Tensor) -> _Columns:
        """Look up columns. `experts` has the shape (n, 1), and `order` holds the columns of each expert, (n, k)."""
        size, kind = self.block_format.block_size, self.block_format.scale_type
        block = order // size
        divisor = scales.divisor(self.stored[experts, block], kind, self.unit)
        is_kept = None if self.peaks is None else self.peaks[experts, block] == (order % size).unsqueeze(-1)
        return _Columns(divisor, is_kept)


class _Sweep:
    """Rounds the columns of a chunk of experts, from the last row of the factor to the first.

    `work` has the shape (n, in, out). Row r belongs to column order[r]. Before the column is rounded, the row holds the
    sum that moves its target. Afterwards the row holds the column's errors.
    """

    def __init__(self, values: Tensor, result: Tensor, grid: _Grid, order: Tensor, factors: Tensor) -> None:
        self._values, self._result, self._grid = values.mT, result.mT, grid
        self._order, self._factors = order, factors
        self._experts = torch.arange(len(values), device=values.device).unsqueeze(-1)
        self._work = torch.zeros_like(self._values, dtype=factors.dtype, memory_format=torch.contiguous_format)

    def run(self) -> None:
        self._round(0, self._order.shape[1])

    def _round(self, start: int, stop: int) -> None:
        if stop - start <= _LEAF:
            self._round_leaf(start, stop)
            return
        middle = start + -(-(stop - start) // (2 * _LEAF)) * _LEAF
        self._round(middle, stop)
        factors, errors = self._factors[:, middle:stop, start:middle], self._work[:, middle:stop]
        self._work[:, start:middle].baddbmm_(factors.mT, errors)
        self._round(start, middle)

    def _round_leaf(self, start: int, stop: int) -> None:
        order, work = self._order[:, start:stop], self._work[:, start:stop]
        factors = self._factors[:, start:stop, start:stop]
        exact = self._values[self._experts, order].to(work.dtype)
        columns, rounded = self._grid.columns(self._experts, order), torch.empty_like(exact)
        for i in reversed(range(stop - start)):
            row, later = slice(i, i + 1), slice(i + 1, None)
            targets = exact[:, row] + work[:, row]
            if i + 1 < stop - start:
                targets.baddbmm_(factors[:, later, row].mT, work[:, later])
            rounded[:, row] = columns.round(i, targets, exact[:, row])
            torch.sub(exact[:, row], rounded[:, row], out=work[:, row])
        kept = torch.where(rounded == exact, exact, rounded)  # a zero keeps its sign
        self._result[self._experts, order] = kept.to(self._result.dtype)


def _factorize(hessians: Tensor, damping: float, act_order: bool, first: int) -> tuple[Tensor, Tensor]:
    """Factorize damped Hessians.

    Args:
        hessians: shape (n, in, in).
        damping: see `round_gptq`.
        act_order: see `round_gptq`.
        first: index of the first expert in the stack.

    Returns:
        order: column of each row of the factors, (n, in). The column that is rounded first comes last.
        factors: L with each column divided by its diagonal, (n, in, in).
    """
    if bad := _indices(~torch.linalg.vector_norm(hessians, torch.inf, dim=(1, 2)).isfinite()):
        raise HessianError(first + bad[0], "has NaN or Inf", is_finite=False)
    count, inputs, _ = hessians.shape
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    columns = torch.arange(inputs, device=hessians.device).expand(count, -1)
    order = (diagonal.argsort(descending=True, stable=True) if act_order else columns).flip(-1)
    experts = torch.arange(count, device=hessians.device).view(-1, 1, 1)
    damped = hessians[experts, order.unsqueeze(2), order.unsqueeze(1)]
    damped.diagonal(dim1=1, dim2=2).add_(damping * diagonal.mean(dim=1, keepdim=True))
    factors, failed_at = torch.linalg.cholesky_ex(damped)
    if bad := _indices(failed_at > 0):
        problem = f"is not positive definite with a damping of {damping:g}"
        raise HessianError(first + bad[0], problem, is_finite=True)
    return order, factors.div_(factors.diagonal(dim1=1, dim2=2).unsqueeze(1).clone())


def _make_grid(
    values: Tensor, block_format: BlockFormat, stored: Tensor | None, unit: Tensor | None, importance: Tensor | None
) -> _Grid:
    """Make the grids of a chunk from the given scales. Without them, choose scales by the format's rule."""
    peaks = None
    if stored is None:
        unit = codec.tensor_scale(values, block_format) if unit is None else unit
        stored = codec.choose_scales(values, block_format, unit, importance)
        if block_format.scale_type is ScaleType.e4m3 and block_format.scale_rule != "mse":
            peaks = values.unflatten(2, (-1, block_format.block_size)).abs().argmax(dim=3).mT.contiguous()
    return _Grid(block_format, stored.view(torch.uint8).mT.contiguous(), unit, peaks)


def _take(
    experts: slice, stored: Tensor | None, tensor_scale: Tensor | None, importance: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the part of some experts. An importance of the shape (in) belongs to all of them."""
    weights = importance if importance is None or importance.ndim == 1 else importance[experts]
    return (
        None if stored is None else stored[experts],
        None if tensor_scale is None else tensor_scale[experts],
        weights,
    )


def _chunks(values: Tensor, hessians: Tensor, experts_at_once: int | None) -> Iterator[slice]:
    """Yield the experts of each chunk. The experts are independent of each other.

    A chunk of n experts takes about 4 n in (in + max(in, out)) bytes of temporaries, or twice as much with float64
    Hessians, and less than 0.15 GB besides. The result takes as much memory as `values`.
    """
    count, out, inputs = values.shape
    if experts_at_once is None:
        bytes_of_one = hessians.element_size() * inputs * (inputs + max(inputs, out))
        limit = _CHUNK_BYTES_ON_CPU if values.device.type in slabs.ONLY_SLABS else _CHUNK_BYTES
        experts_at_once = max(1, limit // bytes_of_one)
    for start in range(0, count, experts_at_once):
        yield slice(start, start + experts_at_once)


def _indices(flags: Tensor) -> list[int]:
    """List the indices of the flags that are True, (n) bool. This waits for the device."""
    return [index for index, flag in enumerate(flags.tolist()) if flag]


def _raise_if_not_finite(values: Tensor, first: int) -> None:
    if bad := _indices(~torch.linalg.vector_norm(values, torch.inf, dim=(1, 2)).isfinite()):
        raise codec.CodecError(f"NaN or Inf in the weights of expert {first + bad[0]}")


def _raise_if_unfit(
    values: Tensor, hessians: Tensor, block_format: BlockFormat, stored: Tensor | None, unit: Tensor | None
) -> None:
    """Raise an error unless shapes and types fit. `codec` checks the rest where it chooses the scales."""
    count, out, inputs = values.shape
    if hessians.shape != (count, inputs, inputs) or hessians.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"weights {tuple(values.shape)} need float32 or float64 Hessians {(count, inputs, inputs)},"
            f" not {hessians.dtype} {tuple(hessians.shape)}"
        )
    if stored is None:
        return
    if stored.shape != (count, out, inputs // block_format.block_size):
        raise ValueError(f"weights {tuple(values.shape)} do not fit scales {tuple(stored.shape)}")
    if (unit is None) != (block_format.scale_type is ScaleType.e8m0):
        raise ValueError(f"{block_format.name} {'needs a' if unit is None else 'takes no'} tensor scale")
    least, most = (0, E8M0_LARGEST) if unit is None else (1, E4M3_LARGEST)
    numbers = stored.view(torch.uint8)
    if bool(((numbers < least) | (numbers > most)).any()):
        raise ValueError(f"scales must be bytes from {least} to {most}")
