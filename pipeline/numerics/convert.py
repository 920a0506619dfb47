"""Converts MXFP4 to NVFP4 without decoding. Each block of 32 becomes two blocks of 16 with the same codes and scale.

An e8m0 scale is a power of two. The type e4m3 has the powers of two from 2^-9 to 2^8. The tensor scale of a matrix is
2^(largest exponent - 8). So a block converts exactly if its exponent is at least the largest exponent minus 17. A block
with a smaller exponent is rounded with the smallest scale. It is counted if this changes a value.

Legend: E = experts (any leading dimensions), out = rows, nb = blocks of 32 per row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.numerics.codec import decode, encode
from pipeline.numerics.formats import E8M0_BIAS, MXFP4, NVFP4
from pipeline.numerics.scales import SMALLEST_TENSOR_EXPONENT, power_of_two

_LARGEST_POWER = 8  # 2^8 is the largest power of two of e4m3
_RANGE = 17  # 2^-9, the smallest power of two of e4m3, is 2^17 times smaller than 2^8
_SPLIT = MXFP4.block_size // NVFP4.block_size


class Converted(NamedTuple):
    """NVFP4 weights.

    Attributes:
        blocks: shape (E, out, 2 nb, 8), uint8. Each byte holds two codes.
        scales: shape (E, out, 2 nb), float8_e4m3fn.
        tensor_scale: shape (E), float32.
        changed_blocks: number of blocks of 16 whose values changed.
    """

    blocks: Tensor
    scales: Tensor
    tensor_scale: Tensor
    changed_blocks: int


def mxfp4_to_nvfp4(blocks: Tensor, scales: Tensor) -> Converted:
    """Convert packed MXFP4 weights. `changed_blocks` of the result counts the blocks that are not exact.

    Args:
        blocks: shape (E, out, nb, 16), uint8.
        scales: shape (E, out, nb), uint8. They are e8m0 scales, and must not be NaN.
    """
    split = blocks.unflatten(-1, (_SPLIT, -1)).flatten(-3, -2)
    exponents = scales.repeat_interleave(_SPLIT, dim=-1).int()
    is_zero = (split & 0x77).amax(dim=-1) == 0
    largest = torch.where(is_zero, 0, exponents).amax(dim=(-2, -1))
    unit = power_of_two((largest - E8M0_BIAS - _LARGEST_POWER).clamp(min=SMALLEST_TENSOR_EXPONENT))
    below = _exponent_of(unit)[..., None, None] + _LARGEST_POWER - exponents
    power = power_of_two(_LARGEST_POWER - below.clamp(0, _RANGE))
    out_of_range = (below > _RANGE) & ~is_zero
    converted = Converted(split.clone(), power.to(torch.float8_e4m3fn), unit, 0)
    return _round(converted, split, exponents, out_of_range) if out_of_range.any() else converted


def _round(converted: Converted, split: Tensor, exponents: Tensor, chosen: Tensor) -> Converted:
    """Encode the chosen blocks again, with the smallest scale of e4m3. Each block becomes a matrix with one row."""
    exact = decode(split[chosen][:, None, None], exponents[chosen].to(torch.uint8)[:, None, None], torch.float32)
    unit = converted.tensor_scale[..., None, None].expand_as(exponents)[chosen]
    blocks, scales = encode(exact, NVFP4, unit)
    converted.blocks[chosen] = blocks.flatten(0, 2)
    # Assign the scales as bytes, because torch 2.13 cannot assign a single float8 value through a mask.
    converted.scales.view(torch.uint8)[chosen] = scales.view(torch.uint8).flatten()
    changed = (decode(blocks, scales, torch.float32, unit) != exact).any(dim=-1)
    return converted._replace(changed_blocks=int(changed.sum()))


def _exponent_of(power_of_two: Tensor) -> Tensor:
    """Return the biased exponent (exponent + 127) of a float32 power of two."""
    return power_of_two.view(torch.int32) >> 23
