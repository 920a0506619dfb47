"""Rounds a stack of weights to given scales: to the nearest value of the format, or stochastically.

Stochastic rounding takes one of the two values of the format next to a weight. It takes the upper value with the
probability (weight - lower) / (upper - lower), so the mean of many draws is the weight itself. Values of e2m1 are not
evenly spaced: the step is 0.5, 1 or 2 times the scale. A change of a hundredth of a step survives in one of a hundred
weights. Nearest rounding loses all such changes.

- A weight that is a value of the format stays as it is. Zeros keep their sign.
- Magnitudes beyond 6 * scale saturate. They are counted.
- The probability is exact up to 2^-32.

The random bits of a weight depend on the seed, on the name of the stack, and on the weight's expert, row and column in
the stack. So the result does not depend on the device, on the block size, or on how the work is split.

Legend: E = experts, in = input dimension, out = output dimension, nb = blocks per row, block = values per block,
lanes = output dimension.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.numerics import codec, kernels, scales, slabs
from pipeline.numerics.compiled import kernel
from pipeline.numerics.formats import BlockFormat
from pipeline.numerics.philox import philox
from pipeline.numerics.scales import Divisor

_WORDS = 4  # words for each counter
_BITS = 32
_LARGEST_CODE = 7.0


@dataclass(frozen=True)
class Noise:
    """The source of a stack's random bits.

    Attributes:
        key: three words. The first is the seed. The others identify the stack.
    """

    key: tuple[int, int, int]

    @classmethod
    def of(cls, seed: int, name: str) -> "Noise":
        """Return the source for a seed (0 to 2^32 - 1) and the name of a stack."""
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        return cls((seed, int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")))


@dataclass(frozen=True)
class Rounded:
    """Rounded weights.

    Attributes:
        blocks: packed codes, (E, out, nb, block / 2) uint8. See `codec.encode`.
        values: decoded values, (E, out, in). They have the type and the memory order of the weights.
        clipped: number of weights whose magnitude exceeds 6 * scale.
    """

    blocks: Tensor
    values: Tensor
    clipped: int


@torch.no_grad()
def round_to_scales(
    values: Tensor,
    block_format: BlockFormat,
    stored: Tensor,
    tensor_scale: Tensor | None = None,
    *,
    noise: Noise | None = None,
    first: int = 0,
) -> Rounded:
    """Round weights to the values of the format that have the given scales.

    Args:
        values: weights, (E, out, in), float32 or bfloat16, any strides. Blocks run along the last dimension.
        block_format: the format. Its scale rule is not used.
        stored: scales of the blocks, (E, out, nb): uint8 for e8m0, float8_e4m3fn for e4m3. They must not be NaN or
            zero, and e8m0 scales must be at most `E8M0_LARGEST`.
        tensor_scale: one scale for each expert, (E) float32. None for e8m0.
        noise: source of random bits for stochastic rounding. None rounds to the nearest value, ties to even.
        first: index of the first expert in its stack. The random bits depend on it.

    Raises:
        CodecError: a block has NaN or Inf, or the block size does not divide `in`.
    """
    size = block_format.block_size
    view = codec.view_blocks(values, block_format)
    codec.raise_if_not_finite(values, block_format)
    rounded = torch.empty_like(values)
    into = slabs.as_blocks(slabs.view_as_matrices(rounded), size)
    blocks = torch.empty((*values.shape[:-1], values.shape[-1] // size, size // 2), dtype=torch.uint8)
    blocks, clipped = blocks.to(values.device), torch.zeros((), dtype=torch.int64, device=values.device)
    for slab, part, divisor in _slabs(view, block_format, stored, tensor_scale):
        clipped += kernels.count_clipped(part, divisor.scale).long().sum()
        near = _round(part, divisor, slab, noise, first)
        slabs.put(into, slab, near)
        slabs.put_transposed(blocks, slab, kernels.pack(near, divisor.inverse, divisor.significand))
    return Rounded(blocks, rounded, int(clipped))


def _slabs(
    view: Tensor, block_format: BlockFormat, stored: Tensor, unit: Tensor | None
) -> Iterator[tuple[slabs.Slab, Tensor, Divisor]]:
    """Yield the slabs of (E, nb, block, lanes) weights, with their weights and divisors."""
    chosen = stored.view(torch.uint8).transpose(1, 2)
    for slab in slabs.split(view):
        of_slab = None if unit is None else unit[slab[0]]
        yield (
            slab,
            slabs.take(view, slab),
            scales.divisor(chosen[slab].contiguous(), block_format.scale_type, of_slab),
        )


def _round(part: Tensor, divisor: Divisor, slab: slabs.Slab, noise: Noise | None, first: int) -> Tensor:
    fields = divisor.inverse, divisor.significand, divisor.scale
    if noise is None:
        return kernels.round_blocks(part, *fields)
    count, nb, _, lanes = part.shape
    starts = (slab[0].start + first, slab[1].start, slab[2].start)
    places = [
        torch.arange(start, start + length, dtype=torch.int64, device=part.device)
        for start, length in zip(starts, (count, nb, lanes), strict=True)
    ]
    key = torch.tensor(noise.key, dtype=torch.int64, device=part.device)
    return _round_at_random(part, *fields, *places, key)


@kernel
def _round_at_random(
    values: Tensor,
    inverse: Tensor,
    significand: Tensor | None,
    scale: Tensor,
    experts: Tensor,
    rows: Tensor,
    lanes: Tensor,
    key: Tensor,
) -> Tensor:
    """Round each value to one of its two neighbours.

    Args:
        values: shape (l, nb, block, lanes).
        inverse: see `Divisor`.
        significand: see `Divisor`.
        scale: see `Divisor`.
        experts: indices of the experts, (l) int64.
        rows: indices of the blocks in a row of the stack, (nb) int64.
        lanes: indices of the output dimension, (lanes) int64.
        key: the words of `Noise`, (3) int64.
    """
    exact = values.float()
    unit = torch.ones_like(scale) if significand is None else significand
    unit = unit.unsqueeze(-2)
    scaled = (exact.abs() * inverse.unsqueeze(-2)).clamp(max=scales.LARGEST_E2M1 * unit)
    code = _code_below(scaled, unit)
    below, above = kernels.magnitudes(code), kernels.magnitudes(code + 1.0)
    # All of these numbers are exact: at most 8 significant bits of a step, and 32 bits of the word.
    step, rest = ((above - below) * unit).double(), (scaled - below * unit).double()
    is_up = _words(experts, rows, lanes, key, values.shape[2]).double() * step < rest * 2.0**_BITS
    code = (code + is_up.float()).clamp(max=_LARGEST_CODE)
    return torch.copysign(kernels.magnitudes(code) * scale.unsqueeze(-2), exact).to(values.dtype)


def _code_below(scaled: Tensor, unit: Tensor) -> Tensor:
    """Return the largest 3-bit codes whose value is at most `scaled`, as floats.

    The bits of a code are decided from the highest to the lowest.
    """
    four = scaled >= 2.0 * unit
    two = scaled >= torch.where(four, 4.0, 1.0) * unit
    one = scaled >= torch.where(four, torch.where(two, 6.0, 3.0), torch.where(two, 1.5, 0.5)) * unit
    return torch.where(four, 4.0, 0.0) + torch.where(two, 2.0, 0.0) + torch.where(one, 1.0, 0.0)


def _words(experts: Tensor, rows: Tensor, lanes: Tensor, key: Tensor, size: int) -> Tensor:
    """Return a random word for each value: (l, nb, size, lanes) int64. A counter serves four values of a row."""
    groups = rows.view(-1, 1) * (size // _WORDS) + torch.arange(size // _WORDS, dtype=torch.int64, device=rows.device)
    counter = groups.view(1, len(rows), -1, 1), lanes.view(1, 1, 1, -1), experts.view(-1, 1, 1, 1), key[2]
    found = philox(counter, (key[0], key[1]))
    return torch.stack(torch.broadcast_tensors(*found), dim=3).flatten(2, 3)
