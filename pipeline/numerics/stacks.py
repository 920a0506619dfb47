"""Functions that convert a whole stack of weights. A GPU runs each of them compiled, in a few launches.

The CPU works in slabs that fit its caches, with several kernels for each slab (see `codec`). A GPU would spend its
time on launching so many kernels. Both ways call the same functions, so they give the same bits.

Legend: L = leading dimension (experts), in = input dimension, out or lanes = output dimension, nb = blocks per row,
block = values per block, r = rank of an adapter.
"""

import torch
from torch import Tensor

from pipeline.numerics import kernels, low_rank, rounding, scales
from pipeline.numerics.compiled import kernel, recomputing_kernel
from pipeline.numerics.formats import ScaleType


@kernel
def round_stack(
    values: Tensor,
    scale_type: ScaleType,
    rule: str,
    unit: Tensor | None,
    weights: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Round values to the values of the format. See `choose_scales` for the other arguments.

    `values` has the shape (L, nb, block, lanes). If `unit` is missing for e4m3, the tensor scales are computed from the
    values.

    Returns:
        rounded: the rounded values: shape (L, nb, block, lanes), type `dtype`.
        is_bad: whether a value is NaN or Inf: shape (), bool.
    """
    amax = kernels.block_amax(values).float()
    if unit is None and scale_type is ScaleType.e4m3:
        unit = scales.tensor_scale_for_amax(amax.amax(dim=(1, 2)), rule)
    chosen = rounding.choose_scales(values, amax, scale_type, rule, unit=unit, weights=weights)
    divisor = scales.divisor(chosen, scale_type, unit)
    rounded = kernels.round_blocks(values, divisor.inverse, divisor.significand, divisor.scale)
    return rounded.to(dtype), (chosen == scales.NAN[scale_type]).any()


@kernel
def decode_stack(blocks: Tensor, stored: Tensor, unit: Tensor | None, out: Tensor) -> Tensor:
    """Decode codes to values, into `out`.

    Args:
        blocks: shape (L, lanes, nb, block / 2), uint8. Each byte holds two codes.
        stored: the stored scales, (L, lanes, nb): e8m0 as uint8, or the values of e4m3 as float32.
        unit: (L) float32, tensor scales, or None for e8m0.
        out: (L, nb, block, lanes) with any strides. It is also the result.
    """
    return out.copy_(_decoded(blocks, stored, unit))


@recomputing_kernel
def merged_amax(
    blocks: Tensor, stored: Tensor, a: Tensor, b: Tensor, scaling: float, block_size: int, dtype: torch.dtype
) -> Tensor:
    """Return the largest magnitude of each block of base + delta, (L, nb, lanes) float32. See `round_merged`.

    `block_size` is the number of values in a block of the result. A block of the base always has 32.
    """
    merged = _merged(blocks, stored, a, b, scaling, dtype=dtype)
    return kernels.block_amax(merged.unflatten(1, (-1, block_size))).float()


@kernel
def choose_divisor(amax: Tensor, scale_type: ScaleType, rule: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Choose scales by a rule with one candidate.

    Args:
        amax: largest magnitude of each block, (L, nb, lanes) float32.
        scale_type: type of the scales.
        rule: the rule, one of SCALE_RULES[scale_type] except `mse`.

    Returns:
        inverse, significand, scale: the fields of `scales.Divisor`.
        is_bad: whether a value is NaN or Inf: shape (), bool.
    """
    unit = scales.tensor_scale_for_amax(amax.amax(dim=(1, 2)), rule) if scale_type is ScaleType.e4m3 else None
    (chosen,) = scales.candidates(amax, scale_type, rule, unit)
    found = scales.divisor(chosen, scale_type, unit)
    return found.inverse, found.significand, found.scale, (chosen == scales.NAN[scale_type]).any()


@recomputing_kernel
def round_merged(
    blocks: Tensor,
    stored: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    inverse: Tensor,
    significand: Tensor | None,
    scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Decode a stack, add the delta of an adapter, and round the sum.

    Args:
        blocks: blocks of the base: shape (L, lanes, in / 32, 16), uint8. Each byte holds two codes.
        stored: e8m0 scales of the base: shape (L, lanes, in / 32), uint8.
        a: A of the adapter, (L, r, in) float32.
        b: B of the adapter, (L, r, out) float32.
        scaling: factor of the delta.
        inverse: see `scales.Divisor`. The shape is (L, nb, lanes). Here nb is the number of blocks per row of the
            result.
        significand: see `scales.Divisor`. The shape is the same.
        scale: see `scales.Divisor`. The shape is the same.
        dtype: type of the decoded weights, of the sum and of the result.

    Returns:
        Rounded weights, (L, in, out) of type `dtype`.
    """
    merged = _merged(blocks, stored, a, b, scaling, dtype=dtype)
    view = merged.unflatten(1, (inverse.shape[1], -1))
    return kernels.round_blocks(view, inverse, significand, scale).flatten(1, 2)


def _merged(blocks: Tensor, stored: Tensor, a: Tensor, b: Tensor, scaling: float, *, dtype: torch.dtype) -> Tensor:
    """Return base + delta, (L, in, out) of type `dtype`."""
    return low_rank.add_delta(_decoded(blocks, stored, None).to(dtype).flatten(1, 2), a, b, scaling)


def _decoded(blocks: Tensor, stored: Tensor, unit: Tensor | None) -> Tensor:
    """Decode to (L, nb, block, lanes) float32. No step needs a tensor in memory, so one launch can do all of them."""
    shifts = torch.arange(0, 8, 4, dtype=torch.uint8, device=blocks.device)
    codes = ((blocks.unsqueeze(-1) >> shifts) & 15).flatten(-2).permute(0, 2, 3, 1)
    return kernels.decode_codes(codes.float(), scales.values_of(stored.transpose(1, 2), unit).unsqueeze(-2))
