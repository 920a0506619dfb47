"""The arithmetic on whole blocks, written once in torch. `compiled` decides whether it is compiled.

Legend: L leading dimension (experts), nb blocks per row, block = values per block, lanes = output dimension. Tensors
may have any strides. Either block or lanes may be contiguous; neither needs a transposed copy.
"""

import torch
from torch import Tensor

from pipeline.numerics.compiled import kernel


@kernel
def block_amax(values: Tensor) -> Tensor:
    """Return the largest magnitude of each block, or NaN if it has one: (L, nb, block, lanes) -> (L, nb, lanes)."""
    return values.abs().amax(-2)


@kernel
def round_blocks(values: Tensor, inverse: Tensor, significand: Tensor | None, scale: Tensor) -> Tensor:
    """Round (L, nb, block, lanes) to the nearest values of the format. The other arguments are the divisor's parts."""
    exact = values.float()
    codes = _nearest_code(exact.abs() * inverse.unsqueeze(-2), significand)
    return torch.copysign(_magnitudes(codes) * scale.unsqueeze(-2), exact).to(values.dtype)


@kernel
def pack(values: Tensor, inverse: Tensor, significand: Tensor | None) -> Tensor:
    """(L, nb, block, lanes) -> (L, nb, block / 2, lanes) uint8 codes. The even element of a pair is the low nibble."""
    exact = values.float()
    codes = _nearest_code(exact.abs() * inverse.unsqueeze(-2), significand)
    codes = codes + (4.0 - torch.copysign(torch.full_like(exact, 4.0), exact))  # bit 3 is the sign
    pairs = codes.unflatten(-2, (-1, 2))
    return (pairs[..., 0, :] + 16.0 * pairs[..., 1, :]).to(torch.uint8)


@kernel
def unpack(blocks: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """(L, nb, block / 2, lanes) uint8, scale (L, nb, lanes) float32 -> (L, nb, block, lanes) of the type of `like`."""
    unit = scale.unsqueeze(-2)
    low, high = _values((blocks & 15).float(), unit), _values((blocks >> 4).float(), unit)
    return torch.stack((low.to(like.dtype), high.to(like.dtype)), dim=-2).flatten(-3, -2)


@kernel
def transpose(matrix: Tensor) -> Tensor:
    """(rows, columns) uint8 -> (columns, rows), contiguous."""
    return matrix.t().contiguous()


def squared_error(values: Tensor, inverse: Tensor, significand: Tensor | None, weights: Tensor | None) -> Tensor:
    """Sum the squared rounding errors of each block, (L, nb, lanes), in units of (2^exponent / 64)^2.

    Each error is rounded to a whole number of 2^exponent / 64, at most 6 * 64. So float32 holds the sum of 32 squares
    (below 2^24) exactly, in any order of summation. Errors and sums are two kernels, because inductor 2.13 would fuse
    them into a loop that is three times slower than both.

    Args:
        values: (L, nb, block, lanes), the values to round.
        inverse: (L, nb, lanes), 2^-exponent of the divisor.
        significand: (L, nb, lanes), significand of the divisor, or None for one.
        weights: (L, nb, block, 1) float64, whole numbers up to 2^16, or None for one.
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
    """Sum over each row the changes by quantization and training: four (..., columns) -> (4, ...) float32.

    The results are the squared error of `rounded_values`, the squares of `values`, the number of values that differ
    from `base`, and the number of rounded values that differ from `rounded_base`. They are for reports: the order of
    summation may differ, so bits may too.
    """
    exact, near = values.float(), rounded_values.float()
    error = exact - near
    moved, changed = exact != base.float(), near != rounded_base.float()
    return torch.stack([each.sum(-1) for each in (error * error, exact * exact, moved.float(), changed.float())])


@kernel
def row_squares(values: Tensor) -> Tensor:
    """Sum the squares of each row, (..., columns) -> (...) float32, in the same way as `row_differences`."""
    exact = values.float()
    return (exact * exact).sum(-1)


@kernel
def column_products(one: Tensor, other: Tensor) -> Tensor:
    """Sum over each column: two (..., rows, columns) -> (4, ..., columns) float32: e b, e e, b b and (e - b)^2.

    The results are for reports: the order of summation may differ, so bits may too.
    """
    e, b = one.float(), other.float()
    return torch.stack([each.sum(-2) for each in (e * b, e * e, b * b, (e - b) * (e - b))])


@kernel
def count_unequal(one: Tensor, other: Tensor) -> Tensor:
    """Count the values in which each block differs: two (nb, block, lanes) -> (nb, lanes) float32."""
    return (one != other).float().sum(-2)


def _nearest_code(scaled: Tensor, significand: Tensor | None) -> Tensor:
    """Magnitudes / 2^exponent -> 3-bit codes as floats. Rounds to nearest, ties to the even code, and saturates at 6.

    The bits of the code are found from the top. The midpoints that decide the upper two bits lie below an even code, so
    a tie goes up. The midpoints that decide the last bit lie above an even code, so a tie goes down.
    """
    unit: Tensor | float = 1.0 if significand is None else significand.unsqueeze(-2)
    four = scaled >= 1.75 * unit
    two = scaled >= torch.where(four, 3.5, 0.75) * unit
    one = scaled > torch.where(four, torch.where(two, 5.0, 2.5), torch.where(two, 1.25, 0.25)) * unit
    return torch.where(four, 4.0, 0.0) + torch.where(two, 2.0, 0.0) + torch.where(one, 1.0, 0.0)


def _magnitudes(codes: Tensor) -> Tensor:
    """Codes 0 to 7 -> 0, .5, 1, 1.5, 2, 3, 4, 6. The function is convex, so it is the maximum of three lines."""
    return torch.maximum(torch.maximum(codes * 0.5, codes - 2.0), codes * 2.0 - 8.0)


def _values(codes: Tensor, unit: Tensor) -> Tensor:
    """Codes 0 to 15 as floats -> values."""
    is_negative = codes >= 8.0
    magnitudes = _magnitudes(torch.where(is_negative, codes - 8.0, codes)) * unit
    return torch.where(is_negative, -magnitudes, magnitudes)
