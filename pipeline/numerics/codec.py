"""The codec: values -> codes and scales -> values. Training's fake quantization and the export both call it.

The idea: a block of 32 values shares a power-of-two scale; each value is divided by it and rounded to the nearest of
the 16 values of e2m1, ties to even (OCP MX v1.0, 5.3.3 and 6.3). The choice made here is the scale (see
`BlockFormat.scale_rule`) and exactness: the scale's exponent is read from the float's bits, not computed with log2,
and the division is by a power of two, so that every device gives the same bits. The cost is a float32 copy of what is
being encoded, several times over: callers hand in one expert, or one layer, at a time.

Two public tools disagree with themselves here: ModelOpt's training kernel rounds ties to even, its exporter toward
zero, so that 0.4 % of the exported BF16 weights are not the trained ones. One definition for both is the point.

Legend: in = input dimension, nb = number of blocks = in / block_size.
"""

import torch
from torch import Tensor

from pipeline.numerics.formats import E2M1_VALUES, E8M0_BIAS, E8M0_VALUES, BlockFormat
from pipeline.numerics.packing import pack_nibbles, unpack_nibbles

_SIGN = 8
_INFINITY_BITS = 0x7F800000
_EXPONENT_SHIFT = 23
_MANTISSA_MASK = 0x7FFFFF
_MANTISSA_OF_SIX = 0x400000  # 6 = 1.5 * 2^2: a larger mantissa than 1.5 needs the next exponent
_LARGEST_EXPONENT_OF_E2M1 = 2


class CodecError(ValueError):
    """Values that cannot be represented; `block` is the index of the first bad block, or None."""

    def __init__(self, message: str, block: tuple[int, ...] | None = None) -> None:
        super().__init__(message)
        self.block = block


def encode(values: Tensor, block_format: BlockFormat) -> tuple[Tensor, Tensor]:
    """Quantize and pack.

    Args:
        values: (..., in) float32 or bfloat16, blocks along the last dimension.
        block_format: a row of FORMATS.

    Magnitudes from 3.5 * 2^126 on round to 2^128, which decodes to Inf: float32 and bfloat16 do not have it.

    Returns:
        blocks: (..., nb, block_size / 2) uint8, two codes a byte.
        scales: (..., nb) uint8, e8m0.

    Raises:
        CodecError: the block size does not divide `in`, or a block holds NaN or Inf.
        TypeError: another dtype (float16 cannot hold the result, float64 would be rounded twice).
    """
    codes, scales = _quantize(_in_blocks(values, block_format), block_format)
    return pack_nibbles(codes), scales


def decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Unpack and dequantize: value = e2m1(code) * 2^(scale - 127), exact in BF16 and FP32 where it is in their range.

    Args:
        blocks: (..., nb, block_size / 2) uint8.
        scales: (..., nb) uint8, e8m0.
        dtype: of the result.

    Returns:
        (..., in) values; a scale of 255 gives NaN, values beyond the dtype's range give Inf.
    """
    return _dequantize(unpack_nibbles(blocks), scales).flatten(-2).to(dtype)


def fake_quantize(values: Tensor, block_format: BlockFormat) -> Tensor:
    """The values that `decode(encode(values))` has, in the dtype of `values`; the gradient passes straight through.

    Args:
        values: (..., in) float32 or bfloat16, blocks along the last dimension.
        block_format: a row of FORMATS.

    Raises:
        CodecError: as `encode`.
    """
    return _StraightThrough.apply(values, block_format)


class _StraightThrough(torch.autograd.Function):
    """Bengio et al. 2013 (arXiv:1308.3432): rounding has zero gradient almost everywhere, so pretend it is one."""

    @staticmethod
    def forward(ctx: object, values: Tensor, block_format: BlockFormat) -> Tensor:
        codes, scales = _quantize(_in_blocks(values, block_format), block_format)
        return _dequantize(codes, scales).flatten(-2).to(values.dtype)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _in_blocks(values: Tensor, block_format: BlockFormat) -> Tensor:
    """(..., in) -> (..., nb, block_size) float32."""
    if values.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"values must be float32 or bfloat16, not {values.dtype}")
    if values.shape[-1] % block_format.block_size:
        raise CodecError(
            f"the input dimension {values.shape[-1]} is not a multiple of the block size {block_format.block_size}"
        )
    return values.detach().float().unflatten(-1, (-1, block_format.block_size))


def _quantize(values: Tensor, block_format: BlockFormat) -> tuple[Tensor, Tensor]:
    """(..., nb, block) float32 -> codes (..., nb, block) uint8, scales (..., nb) uint8."""
    bits = values.view(torch.int32)
    amax = (bits & 0x7FFFFFFF).amax(dim=-1)  # as integers: positive floats order like their bits
    _raise_if_not_finite(amax)
    scales = _SCALE_RULES[block_format.scale_rule](amax)
    scaled = values.abs() * _table(_INVERSE_SCALES, values)[scales.int()].unsqueeze(-1)
    codes = _round_to_e2m1(scaled) | ((bits < 0).to(torch.uint8) * _SIGN)
    return codes, scales


def _ceil_scales(amax_bits: Tensor) -> Tensor:
    """Bits of each block's largest magnitude -> e8m0 byte of 2^ceil(log2(amax / 6)), at least 2^-127."""
    exponent = amax_bits >> _EXPONENT_SHIFT  # biased by 127, as e8m0 is
    above_six = (amax_bits & _MANTISSA_MASK) > _MANTISSA_OF_SIX
    return (exponent - _LARGEST_EXPONENT_OF_E2M1 + above_six).clamp_(min=0).to(torch.uint8)


def _round_to_e2m1(magnitudes: Tensor) -> Tensor:
    """Magnitudes of at most 6 -> 3-bit codes, to nearest, ties to the even code."""
    codes = torch.zeros(magnitudes.shape, dtype=torch.uint8, device=magnitudes.device)
    for midpoint, even_is_above in _MIDPOINTS:
        codes += (magnitudes >= midpoint) if even_is_above else (magnitudes > midpoint)
    return codes


def _dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """codes (..., nb, block), scales (..., nb) -> (..., nb, block) float32."""
    values = _table(E2M1_VALUES, codes)[codes.int()]
    return values * _table(E8M0_VALUES, scales)[scales.int()].unsqueeze(-1)


def _raise_if_not_finite(amax_bits: Tensor) -> None:
    bad = amax_bits >= _INFINITY_BITS
    if bad.any():
        block = tuple(int(i) for i in bad.nonzero()[0])
        raise CodecError(f"NaN or Inf in {int(bad.sum())} blocks, the first at index {list(block)}", block)


def _table(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


_SCALE_RULES = {"ceil": _ceil_scales}

# 2^(127 - byte). Bytes above 253 belong to no finite block (the largest float32 has byte 253).
_INVERSE_SCALES = tuple(2.0 ** (E8M0_BIAS - byte) for byte in range(254))

# Between codes c and c + 1: the midpoint of their values, and whether the even one of the two codes is c + 1.
_MIDPOINTS = tuple(((E2M1_VALUES[code] + E2M1_VALUES[code + 1]) / 2, (code + 1) % 2 == 0) for code in range(7))
