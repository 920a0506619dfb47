"""The arithmetic over whole blocks, written once in torch; `compiled` decides how it runs, with the same bits.

Legend: L leading dimension (experts), nb blocks per row, block = values per block, lanes = output dimension. Tensors
may have any strides: whichever of block and lanes is contiguous, no transposed copy is made.
"""

import torch
from torch import Tensor

from pipeline.numerics.compiled import kernel


@kernel
def block_amax(values: Tensor) -> Tensor:
    """(L, nb, block, lanes) -> (L, nb, lanes): the largest magnitude, NaN where there is one."""
    return values.abs().amax(-2)


@kernel
def rounded(values: Tensor, inverse: Tensor, significand: Tensor | None, scale: Tensor) -> Tensor:
    """(L, nb, block, lanes) and the parts of its divisor (L, nb, lanes) -> the nearest values of the format."""
    exact = values.float()
    codes = _nearest_code(exact.abs() * inverse.unsqueeze(-2), significand)
    return torch.copysign(_magnitudes(codes) * scale.unsqueeze(-2), exact).to(values.dtype)


@kernel
def packed(values: Tensor, inverse: Tensor, significand: Tensor | None) -> Tensor:
    """(L, nb, block, lanes) -> (L, nb, block / 2, lanes) uint8: the even element of a pair in the low nibble."""
    exact = values.float()
    codes = _nearest_code(exact.abs() * inverse.unsqueeze(-2), significand)
    codes = codes + (4.0 - torch.copysign(torch.full_like(exact, 4.0), exact))  # bit 3 where the sign is set
    pairs = codes.unflatten(-2, (-1, 2))
    return (pairs[..., 0, :] + 16.0 * pairs[..., 1, :]).to(torch.uint8)


@kernel
def unpacked(blocks: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """(L, nb, block / 2, lanes) uint8, scale (L, nb, lanes) float32 -> (L, nb, block, lanes) of the type of `like`."""
    unit = scale.unsqueeze(-2)
    low, high = _values((blocks & 15).float(), unit), _values((blocks >> 4).float(), unit)
    return torch.stack((low.to(like.dtype), high.to(like.dtype)), dim=-2).flatten(-3, -2)


@kernel
def transposed(matrix: Tensor) -> Tensor:
    """(rows, columns) uint8 -> (columns, rows), contiguous."""
    return matrix.t().contiguous()


def squared_error(values: Tensor, inverse: Tensor, significand: Tensor | None, weights: Tensor | None) -> Tensor:
    """(L, nb, block, lanes) -> (L, nb, lanes): the error of rounding, squared, in units of (2^exponent / 64)^2.

    Each error is a whole number of units, at most 6 * 64, so that float32 holds the sum of 32 squares (below 2^24)
    exactly, in whatever order they are added. Two kernels, since
    inductor 2.13 makes a loop three times slower than both of a sum over that much arithmetic.

    Args:
        values: what is rounded.
        inverse: 2^-exponent of the divisor, (L, nb, lanes).
        significand: of the divisor, (L, nb, lanes), or None for one.
        weights: (L, nb, block, 1) float64 of whole numbers up to 2^16, or None for one.
    """
    return _block_sum(_squared_errors(values, inverse, significand, weights))


@kernel
def _squared_errors(values: Tensor, inverse: Tensor, significand: Tensor | None, weights: Tensor | None) -> Tensor:
    scaled = values.float().abs() * inverse.unsqueeze(-2)
    nearest = _magnitudes(_nearest_code(scaled, significand))
    if significand is not None:
        nearest = nearest * significand.unsqueeze(-2)
    units = torch.round((scaled - nearest) * 64.0)
    return units * units if weights is None else units.double() * units.double() * weights


@kernel
def _block_sum(values: Tensor) -> Tensor:
    return values.sum(-2)


@kernel
def row_differences(values: Tensor, rounded_values: Tensor, base: Tensor, rounded_base: Tensor) -> Tensor:
    """How far quantization and training went: (4, ...) float32 from four (..., columns).

    Sums over a row: the squared error of `rounded_values`, the squares of `values`; counts of values that differ from
    `base`, and of rounded values that differ from `rounded_base`. For reports: the order of these sums may differ.
    """
    exact, near = values.float(), rounded_values.float()
    error = exact - near
    moved, changed = exact != base.float(), near != rounded_base.float()
    return torch.stack([each.sum(-1) for each in (error * error, exact * exact, moved.float(), changed.float())])


@kernel
def row_squares(values: Tensor) -> Tensor:
    """(..., columns) -> (...) float32: the sum of squares of a row, as `row_differences` has it."""
    exact = values.float()
    return (exact * exact).sum(-1)


@kernel
def column_products(one: Tensor, other: Tensor) -> Tensor:
    """(..., rows, columns) twice -> (4, ..., columns) float32, sums over a column: e b, e e, b b and (e - b)^2.

    For reports: the order of these sums may differ.
    """
    e, b = one.float(), other.float()
    return torch.stack([each.sum(-2) for each in (e * b, e * e, b * b, (e - b) * (e - b))])


@kernel
def unequal(one: Tensor, other: Tensor) -> Tensor:
    """(nb, block, lanes) twice -> (nb, lanes) float32: in how many values a block differs."""
    return (one != other).float().sum(-2)


def _nearest_code(scaled: Tensor, significand: Tensor | None) -> Tensor:
    """Magnitudes over 2^exponent -> 3-bit codes as floats: nearest, ties to the even code, saturating at 6.

    A search for the bits of the code from the top. The midpoints that decide the upper two bits lie below an even code,
    so that a tie belongs above; those that decide the last bit lie above one, so that a tie belongs below.
    """
    unit: Tensor | float = 1.0 if significand is None else significand.unsqueeze(-2)
    four = scaled >= 1.75 * unit
    two = scaled >= torch.where(four, 3.5, 0.75) * unit
    one = scaled > torch.where(four, torch.where(two, 5.0, 2.5), torch.where(two, 1.25, 0.25)) * unit
    return torch.where(four, 4.0, 0.0) + torch.where(two, 2.0, 0.0) + torch.where(one, 1.0, 0.0)


def _magnitudes(codes: Tensor) -> Tensor:
    """Codes 0 to 7 -> 0, .5, 1, 1.5, 2, 3, 4, 6: steps of a half, of one, of two; convex, so a maximum of lines."""
    return torch.maximum(torch.maximum(codes * 0.5, codes - 2.0), codes * 2.0 - 8.0)


def _values(codes: Tensor, unit: Tensor) -> Tensor:
    """Codes 0 to 15 as floats -> values."""
    is_negative = codes >= 8.0
    magnitudes = _magnitudes(torch.where(is_negative, codes - 8.0, codes)) * unit
    return torch.where(is_negative, -magnitudes, magnitudes)
