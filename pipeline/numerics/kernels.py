"""Arithmetic on whole blocks, written in torch. The module `compiled` decides whether a function runs compiled.

Legend: L = leading dimension (experts), nb = blocks per row, block = values per block, lanes = output dimension.

Tensors may have any strides. Either `block` or `lanes` may be contiguous. No transposed copy is made in either case.
"""

import torch
from torch import Tensor

from pipeline.numerics.compiled import kernel
from pipeline.numerics.scales import LARGEST_E2M1


@kernel
def block_amax(values: Tensor) -> Tensor:
    """Return the largest magnitude of each block, or NaN if the block has NaN.

    Shapes: (L, nb, block, lanes) -> (L, nb, lanes).
    """
    return values.abs().amax(-2)


@kernel
def round_blocks(values: Tensor, inverse: Tensor, significand: Tensor | None, scale: Tensor) -> Tensor:
    """Round values to the nearest values of the format. The other arguments are `Divisor` fields.

    `values` has the shape (L, nb, block, lanes).
    """
    exact = values.float()
    codes = _nearest_code(exact.abs() * inverse.unsqueeze(-2), significand)
    return torch.copysign(magnitudes(codes) * scale.unsqueeze(-2), exact).to(values.dtype)


@kernel
def pack(values: Tensor, inverse: Tensor, significand: Tensor | None) -> Tensor:
    """Encode values, two codes per byte: (L, nb, block, lanes) -> (L, nb, block / 2, lanes) uint8.

    The even element of a pair is the low nibble.
    """
    exact = values.float()
    codes = _nearest_code(exact.abs() * inverse.unsqueeze(-2), significand)
    codes = codes + (4.0 - torch.copysign(torch.full_like(exact, 4.0), exact))  # bit 3 is the sign
    pairs = codes.unflatten(-2, (-1, 2))
    return (pairs[..., 0, :] + 16.0 * pairs[..., 1, :]).to(torch.uint8)


@kernel
def unpack(blocks: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """Unpack and decode codes. The result has the type of `like`.

    Shapes: (L, nb, block / 2, lanes) -> (L, nb, block, lanes). `blocks` has the type uint8. `scale` has the shape
    (L, nb, lanes) and the type float32.
    """
    unit = scale.unsqueeze(-2)
    low, high = decode_codes((blocks & 15).float(), unit), decode_codes((blocks >> 4).float(), unit)
    return torch.stack((low.to(like.dtype), high.to(like.dtype)), dim=-2).flatten(-3, -2)


@kernel
def transpose(matrix: Tensor) -> Tensor:
    """Transpose a uint8 matrix. The result is contiguous."""
    return matrix.t().contiguous()


def squared_error(values: Tensor, inverse: Tensor, significand: Tensor | None, weights: Tensor | None) -> Tensor:
    """Sum the squared rounding errors of each block. The result has the shape (L, nb, lanes).

    The unit of an error is 2^exponent / 64. Each error is rounded to a whole number of units, at most 6 * 64. So
    float32 holds the sum of 32 squares (below 2^24) exactly, in any order of summation.

    One kernel computes the errors, and another kernel computes the sums. In a single kernel, inductor 2.13 would fuse
    them into a loop that takes three times as long as the two kernels together.

    Args:
        values: the values to round, shape (L, nb, block, lanes).
        inverse: 2^-exponent of the divisor, shape (L, nb, lanes).
        significand: significand of the divisor, shape (L, nb, lanes). None if it is 1.
        weights: weights of the squares, shape (L, nb, block, 1), float64. They are whole numbers up to 2^16. None if
            all are 1.
    """
    return _block_sum(_squared_errors(values, inverse, significand, weights))


@kernel
def _squared_errors(values: Tensor, inverse: Tensor, significand: Tensor | None, weights: Tensor | None) -> Tensor:
    scaled = values.float().abs() * inverse.unsqueeze(-2)
    nearest = magnitudes(_nearest_code(scaled, significand))
    if significand is not None:
        nearest = nearest * significand.unsqueeze(-2)
    units = torch.round((scaled - nearest) * 64.0)
    return units * units if weights is None else units.double() * units.double() * weights


@kernel
def _block_sum(values: Tensor) -> Tensor:
    return values.sum(-2)


@kernel
def row_differences(values: Tensor, rounded_values: Tensor, base: Tensor, rounded_base: Tensor) -> Tensor:
    """Measure how much quantization and training changed each row.

    Each argument has the shape (..., columns). The result has the shape (4, ...) and the type float32.

    The result holds four numbers for each row:
    1. the sum of the squared errors of `rounded_values`;
    2. the sum of the squares of `values`;
    3. the number of values that differ from `base`;
    4. the number of rounded values that differ from `rounded_base`.

    They are for reports only, because their bits may depend on the order of summation.
    """
    return torch.stack(_differences(values.float(), rounded_values.float(), base.float(), rounded_base.float()))


@kernel
def row_changes(values: Tensor, rounded_values: Tensor, base: Tensor, rounded_base: Tensor) -> Tensor:
    """Measure the differences as `row_differences` does, and how much of the change by training rounding keeps.

    Arguments are those of `row_differences`. The result has the shape (8, ...) and the type float32. The first four
    numbers of a row are those of `row_differences`. With d = values - base and r = rounded_values - base, the others
    are the sums of d^2, r * d, r^2 and base^2.
    """
    exact, near, before = values.float(), rounded_values.float(), base.float()
    d, r = exact - before, near - before
    products = [each.sum(-1) for each in (d * d, r * d, r * r, before * before)]
    return torch.stack([*_differences(exact, near, before, rounded_base.float()), *products])


def _differences(exact: Tensor, near: Tensor, base: Tensor, rounded_base: Tensor) -> list[Tensor]:
    error, moved, changed = exact - near, exact != base, near != rounded_base
    return [each.sum(-1) for each in (error * error, exact * exact, moved.float(), changed.float())]


@kernel
def row_squares(values: Tensor) -> Tensor:
    """Sum the squares of each row, in the same way as `row_differences`. The result is float32.

    Shapes: (..., columns) -> (...).
    """
    exact = values.float()
    return (exact * exact).sum(-1)


@kernel
def column_products(one: Tensor, other: Tensor) -> Tensor:
    """Sum e * b, e * e, b * b and (e - b)^2 over each column of two tensors, e and b.

    Both tensors have the shape (..., rows, columns). The result has the shape (4, ..., columns) and the type float32.

    The results are for reports only, because their bits may depend on the order of summation.
    """
    e, b = one.float(), other.float()
    return torch.stack([each.sum(-2) for each in (e * b, e * e, b * b, (e - b) * (e - b))])


@kernel
def count_clipped(values: Tensor, scale: Tensor) -> Tensor:
    """For each block, count the values beyond 6 * scale. The result is float32.

    `values` has the shape (L, nb, block, lanes). `scale` and the result have the shape (L, nb, lanes).
    """
    return (values.float().abs() > LARGEST_E2M1 * scale.unsqueeze(-2)).float().sum(-2)


@kernel
def count_unequal(one: Tensor, other: Tensor) -> Tensor:
    """For each block, count the values that differ between two tensors. The result is float32.

    Both tensors have the shape (nb, block, lanes). The result has the shape (nb, lanes).
    """
    return (one != other).float().sum(-2)


def _nearest_code(scaled: Tensor, significand: Tensor | None) -> Tensor:
    """Round `scaled` to the nearest 3-bit codes. Ties go to the even code.

    `scaled` is magnitudes / 2^exponent. Codes are returned as floats. Magnitudes above 6 * significand saturate.

    The bits of the code are decided from the highest to the lowest. The midpoints that decide the upper two bits lie
    below an even code, so a tie goes up. The midpoints that decide the last bit lie above an even code, so a tie goes
    down.
    """
    unit: Tensor | float = 1.0 if significand is None else significand.unsqueeze(-2)
    four = scaled >= 1.75 * unit
    two = scaled >= torch.where(four, 3.5, 0.75) * unit
    one = scaled > torch.where(four, torch.where(two, 5.0, 2.5), torch.where(two, 1.25, 0.25)) * unit
    return torch.where(four, 4.0, 0.0) + torch.where(two, 2.0, 0.0) + torch.where(one, 1.0, 0.0)


def magnitudes(codes: Tensor) -> Tensor:
    """Map codes 0 to 7 to 0, .5, 1, 1.5, 2, 3, 4, 6. The map is convex, so it is the maximum of its three lines."""
    return torch.maximum(torch.maximum(codes * 0.5, codes - 2.0), codes * 2.0 - 8.0)


def decode_codes(codes: Tensor, unit: Tensor) -> Tensor:
    """Decode codes 0 to 15, given as floats, to values. `unit` is the scale, broadcast to the codes."""
    is_negative = codes >= 8.0
    values = magnitudes(torch.where(is_negative, codes - 8.0, codes)) * unit
    # On a GPU, Triton computes -x as 0 - x. That would turn code 8 into +0 instead of -0.
    return torch.where(is_negative, values * -1.0, values)
