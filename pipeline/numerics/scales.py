"""Computes the scale of a block from its largest magnitude, for each type of scale and each rule.

Scales are computed from the bits of the largest magnitude, by exact comparisons instead of logarithms and divisions.
So every device computes the same scale. The rule `mse` has two candidates; the codec takes the candidate with the
smaller squared error. Every other rule has one candidate.

A scale is significand * 2^exponent. For e8m0 the significand is 1. For e4m3 it has four bits and is kept separate from
the power of two. Dividing by a power of two is exact, and so is comparing with midpoint * significand. Dividing by
a significand like 1.125 would be neither exact nor the same on every device.

The tensor scale is a power of two as well, so that dividing by it is exact. For most rules, it is the smallest power
with amax <= 6 * 448 * scale. (Common practice is amax / (6 * 448).) All values of the format are then exact in BF16.
Rounding the tensor scale up to a power of two costs at most one of the 17 binades of e4m3.

Legend: amax = largest magnitude of each block, (L, nb, lanes) float32; bytes = scale bytes, held in int32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.numerics.compiled import kernel
from pipeline.numerics.formats import E4M3_LARGEST, E4M3_NAN, E8M0_LARGEST, E8M0_NAN, SCALE_RULES, ScaleType

LARGEST_E2M1 = 6.0

_EXPONENT_SHIFT = 23
_EXPONENT_BIAS = 127
_NAN_BITS = 0x7FC00000
_MANTISSA_MASK = 0x7FFFFF
_MANTISSA_OF_SIX = 0x400000  # 6 = 1.5 * 2^2, so a mantissa above 1.5 needs the next exponent
_MANTISSA_OF_2688 = 0x280000  # 6 * 448 = 1.3125 * 2^11
_MANTISSA_OF_1792 = 0x600000  # 4 * 448 = 1.75 * 2^10
_BITS_OF_SMALLEST_E8M0 = 0x400000  # 2^-127, a subnormal float
SMALLEST_TENSOR_EXPONENT = -110
"""Exponent of the smallest tensor scale.

The limit keeps decoded values (tensor scale * e4m3 * e2m1) from being subnormal in FP32.
"""


@dataclass(frozen=True)
class Divisor:
    """The divisor of the values in each block. All tensors have the shape (L, nb, lanes) and the type float32.

    Attributes:
        inverse: 2^-exponent. Multiplying by it is exact.
        significand: at least 1 and less than 2. For e8m0 it is always 1, and this field is None.
        scale: significand * 2^exponent. The decoded value is the e2m1 value times `scale`.
    """

    inverse: Tensor
    significand: Tensor | None
    scale: Tensor


def candidates(amax: Tensor, scale_type: ScaleType, rule: str, tensor_scale: Tensor | None) -> list[Tensor]:
    """Compute the candidates of a rule. The first wins a tie.

    Each candidate is a tensor of scale bytes. It has the shape (L, nb, lanes) and the type uint8. A block with NaN
    or Inf gets the byte NAN[scale_type].
    """
    if tensor_scale is not None:
        amax = _in_units(amax, reciprocal(tensor_scale)[:, None, None])
    return [choose(amax) for choose in _RULES[scale_type][rule]]


def divisor(scales: Tensor, scale_type: ScaleType, tensor_scale: Tensor | None) -> Divisor:
    """Compute the divisor for scale bytes (L, nb, lanes).

    `tensor_scale` is (L,) for e4m3. It is not used for e8m0.
    """
    if scale_type is ScaleType.e8m0:
        inverse, scale = _e8m0_parts(scales)
        return Divisor(inverse, None, scale)
    assert tensor_scale is not None
    return Divisor(*_e4m3_parts(scales, tensor_scale[:, None, None]))


def values_of(scales: Tensor, tensor_scale: Tensor | None) -> Tensor:
    """Decode stored scales to float32. If there is a tensor scale, multiply by it.

    `scales` has the shape (L, ...). uint8 scales are e8m0. float8_e4m3fn scales need a tensor scale.

    Raises:
        TypeError: a tensor scale is given for uint8 scales, or is missing for float8_e4m3fn scales.
    """
    is_e8m0 = scales.dtype == torch.uint8
    if is_e8m0 != (tensor_scale is None):
        raise TypeError(f"{scales.dtype} scales {'have no' if is_e8m0 else 'need a'} tensor scale")
    if tensor_scale is None:
        return _e8m0_values(scales)
    return scales.float() * tensor_scale.view(-1, *[1] * (scales.ndim - 1))


def power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent as float32 for int32 exponents from -126 to 127. It is made from bits, so it is exact."""
    return ((exponent + _EXPONENT_BIAS) << _EXPONENT_SHIFT).view(torch.float32)


def reciprocal(powers: Tensor) -> Tensor:
    """Return 1 / powers for float32 powers of two from 2^-126 to 2^126.

    The result is made from bits. torch's own reciprocal, if compiled for a GPU, would be an approximate division.
    """
    return ((2 * _EXPONENT_BIAS << _EXPONENT_SHIFT) - powers.view(torch.int32)).view(torch.float32)


def ratio(dividend: Tensor, divisor: Tensor) -> Tensor:
    """Return dividend / divisor for float32 powers of two.

    The result is made from bits. The powers and the result must not be subnormal.
    """
    bits = dividend.view(torch.int32) - divisor.view(torch.int32) + (_EXPONENT_BIAS << _EXPONENT_SHIFT)
    return bits.view(torch.float32)


INPUT_RULE = "nearest"
"""Rule for the scales of experts' inputs. Inference kernels quantize inputs at run time, by this cheap rule."""


def tensor_scale_for_amax(amax: Tensor, rule: str) -> Tensor:
    """Compute the tensor scale for each largest magnitude: a power of two, at least 2^-110.

    It is the smallest power for which e4m3 can hold every candidate of the rule. Most rules need
    amax <= 6 * 448 * scale. `mse` has the candidate amax / 4, so it needs amax <= 4 * 448 * scale.
    """
    bits = amax.contiguous().view(torch.int32)
    power, mantissa = (10, _MANTISSA_OF_1792) if rule == "mse" else (11, _MANTISSA_OF_2688)
    exponent = (bits >> _EXPONENT_SHIFT) - power + ((bits & _MANTISSA_MASK) > mantissa).int()
    return (exponent.clamp(min=1) << _EXPONENT_SHIFT).view(torch.float32).clamp(min=2.0**SMALLEST_TENSOR_EXPONENT)


@kernel
def _e8m0_ceil(amax: Tensor) -> Tensor:
    """Return the bytes of 2^ceil(log2(amax / 6))."""
    return _e8m0_bytes(amax, _exponent_of_ceil(amax.view(torch.int32)))


@kernel
def _e8m0_floor(amax: Tensor) -> Tensor:
    """Return the bytes of 2^(floor(log2(amax)) - 2)."""
    return _e8m0_bytes(amax, (amax.view(torch.int32) >> _EXPONENT_SHIFT) - 2)


@kernel
def _e8m0_below_ceil(amax: Tensor) -> Tensor:
    return _e8m0_bytes(amax, _exponent_of_ceil(amax.view(torch.int32)).clamp(0, E8M0_LARGEST) - 1)


def _exponent_of_ceil(bits: Tensor) -> Tensor:
    return (bits >> _EXPONENT_SHIFT) - 2 + ((bits & _MANTISSA_MASK) > _MANTISSA_OF_SIX).int()


def _e8m0_bytes(amax: Tensor, biased_exponent: Tensor) -> Tensor:
    return torch.where(amax < math.inf, biased_exponent.clamp(0, E8M0_LARGEST), E8M0_NAN).to(torch.uint8)


@kernel
def _e8m0_parts(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Decode bytes up to 252. Return the inverses, 2^(127 - byte), and the scales, 2^(byte - 127)."""
    index = scales.int()
    return ((254 - index) << _EXPONENT_SHIFT).view(torch.float32), _e8m0_bits(index).view(torch.float32)


@kernel
def _e8m0_values(scales: Tensor) -> Tensor:
    """Decode any byte to 2^(byte - 127), or to NaN for 255."""
    index = scales.int()
    return torch.where(index == E8M0_NAN, _NAN_BITS, _e8m0_bits(index)).view(torch.float32)


def _e8m0_bits(index: Tensor) -> Tensor:
    """Return the bits of the float 2^(byte - 127). Bytes are int32 below 255. Byte 0 gives a subnormal."""
    return torch.where(index == 0, _BITS_OF_SMALLEST_E8M0, index << _EXPONENT_SHIFT)


@kernel
def _in_units(amax: Tensor, inverse: Tensor) -> Tensor:
    """Divide amax by the tensor scale. If amax is finite, the result is finite too.

    Finite amax is capped at 2^127, so that 6 * scale is finite in FP32.
    """
    return torch.where(amax < math.inf, (amax.clamp(max=2.0**127) * inverse).clamp(max=2.0**100), amax)


@kernel
def _e4m3_ceil(amax: Tensor) -> Tensor:
    return _e4m3_bytes(amax, _ceil_to_e4m3(amax, 6.0))


@kernel
def _e4m3_floor(amax: Tensor) -> Tensor:
    return _e4m3_bytes(amax, _neighbours_in_e4m3(amax, 6.0)[0])


@kernel
def _e4m3_nearest(amax: Tensor) -> Tensor:
    return _e4m3_bytes(amax, _nearest_e4m3(amax, 6.0))


@kernel
def _e4m3_nearest_to_a_quarter(amax: Tensor) -> Tensor:
    return _e4m3_bytes(amax, _nearest_e4m3(amax, 4.0))


def _ceil_to_e4m3(amax: Tensor, largest: float) -> Tensor:
    """Find the smallest scale with amax <= largest * scale. Estimate it first, then correct it by exact comparisons."""
    guess = amax * (1.0 / largest)
    byte = torch.where(guess < 2.0**-6, (guess * 512.0).int(), (guess.view(torch.int32) >> 20) - (120 << 3))
    byte = byte.clamp(1, E4M3_LARGEST) - 1
    for _ in range(3):
        byte = (byte + (largest * _e4m3_values(byte) < amax).int()).clamp(max=E4M3_LARGEST)
    return byte


def _neighbours_in_e4m3(amax: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Find the scales below and above amax / largest. They are the same if amax / largest is itself a scale."""
    above = _ceil_to_e4m3(amax, largest)
    return above - (largest * _e4m3_values(above) > amax).int(), above


def _nearest_e4m3(amax: Tensor, largest: float) -> Tensor:
    """Find the scale nearest to amax / largest, ties to even."""
    below, above = _neighbours_in_e4m3(amax, largest)
    middle = largest * (_e4m3_values(above) + _e4m3_values(below))
    takes_above = (2.0 * amax > middle) | ((2.0 * amax == middle) & ((above & 1) == 0))
    return torch.where(takes_above, above, below)


def _e4m3_bytes(amax: Tensor, byte: Tensor) -> Tensor:
    """Return the bytes to store. They are at least 1 (the smallest subnormal), because values are divided by scales."""
    return torch.where(amax < math.inf, byte.clamp(1, E4M3_LARGEST), E4M3_NAN).to(torch.uint8)


def _e4m3_values(byte: Tensor) -> Tensor:
    """Decode finite bytes, given as int32. Subnormals are multiples of 2^-9; the exponent bias is 7."""
    normal = ((byte + (120 << 3)) << 20).view(torch.float32)
    return torch.where(byte < 8, byte.float() * 2.0**-9, normal)


@kernel
def _e4m3_parts(scales: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the fields of `Divisor` from bytes and tensor scales. Bytes must be finite and above zero."""
    byte = scales.int()
    exponent = 136 - (byte >= 2).int() - (byte >= 4).int() - (byte >> 3)
    inverse, value = (exponent << _EXPONENT_SHIFT).view(torch.float32), _e4m3_values(byte)
    return inverse * reciprocal(unit), value * inverse, value * unit


NAN = {ScaleType.e8m0: E8M0_NAN, ScaleType.e4m3: E4M3_NAN}
"""The byte that marks a block with NaN or Inf."""

_RULES: dict[ScaleType, dict[str, tuple[Callable[[Tensor], Tensor], ...]]] = {
    ScaleType.e8m0: {"ceil": (_e8m0_ceil,), "floor": (_e8m0_floor,), "mse": (_e8m0_ceil, _e8m0_below_ceil)},
    ScaleType.e4m3: {
        "nearest": (_e4m3_nearest,),
        "ceil": (_e4m3_ceil,),
        "floor": (_e4m3_floor,),
        "mse": (_e4m3_nearest, _e4m3_nearest_to_a_quarter),
    },
}
assert {kind: tuple(rules) for kind, rules in _RULES.items()} == SCALE_RULES
