"""Counts blocks by the largest magnitude among their codes.

The largest code of a block tells what a scale rule does after training. A block whose largest code is 6 has no room: if
that weight grows, `ceil` doubles the scale of the block.

Legend: nb = blocks per row, half = bytes per block, w = 64-bit words per block.
"""

import torch
from torch import Tensor

from pipeline.numerics import kernels
from pipeline.numerics.compiled import kernel

_CODES = 8  # 3-bit codes; the fourth bit is the sign
_LOWEST_BIT_OF_EACH_CODE = 0x1111_1111_1111_1111


def count_largest(blocks: Tensor) -> Tensor:
    """Count blocks by their largest 3-bit code. The result is int64, with one number for each entry of `MAGNITUDES`.

    `blocks` are packed codes, (..., nb, half) uint8, contiguous. `half` is a multiple of 8.
    """
    words = blocks.contiguous().view(-1).view(torch.int64).view(-1, blocks.shape[-1] // 8)
    return torch.bincount(_largest_codes(words), minlength=_CODES)


MAGNITUDES: tuple[float, ...] = tuple(kernels.magnitudes(torch.arange(_CODES, dtype=torch.float32)).tolist())
"""Code -> its magnitude: 0, 0.5, 1, 1.5, 2, 3, 4, 6."""


@kernel
def _largest_codes(words: Tensor) -> Tensor:
    """Return the largest 3-bit code in each row of 64-bit words: (blocks, w) int64 -> (blocks) int64.

    A word holds 16 codes. The bits of the largest code are decided from the highest to the lowest, for all codes of a
    word at once. The codes that can still be the largest are marked in their lowest bit.
    """
    parts = list(words.unbind(-1))
    marked = [torch.full_like(part, _LOWEST_BIT_OF_EACH_CODE) for part in parts]
    largest = torch.zeros_like(parts[0])
    for bit in (2, 1, 0):
        with_bit = [(part >> bit) & marks for part, marks in zip(parts, marked, strict=True)]
        found = with_bit[0] != 0
        for each in with_bit[1:]:
            found = found | (each != 0)
        marked = [torch.where(found, have, marks) for have, marks in zip(with_bit, marked, strict=True)]
        largest = largest + (found.long() << bit)
    return largest
