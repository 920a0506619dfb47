"""View values as blocks, and split them into slabs. Slabs are converted one after the other.

Legend: L = leading dimension (experts), nb = blocks per row, block = values per block, lanes = output dimension.
For the codes of a slab: l = experts, rows = blocks per row, half = bytes per block.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.numerics import kernels

Slab = tuple[slice, slice, slice]
"""Index ranges: experts, blocks of a row, and lanes."""

ONLY_SLABS = frozenset({"cpu"})
"""Types of device that work faster on small parts (one slab or one expert) than on a whole stack at once."""

VALUES = {"cpu": 1 << 22, "cuda": 1 << 25}
LANES = {"cpu": 1 << 12, "cuda": 1 << 31}
"""Maximum numbers of values and of lanes in a slab, for each type of device.

On a GPU, slabs keep the temporaries of eager functions small.
"""


def works_whole(values: Tensor) -> bool:
    """Return whether a stack should be converted by one compiled function, not slab by slab."""
    return values.device.type not in ONLY_SLABS and values.numel() > 0


def as_matrices(values: Tensor) -> Tensor:
    """Reshape values to (L, out, in). `values` has the shape (..., out, in). A single row has the shape (in)."""
    return values.reshape(_matrices(values.shape))


def view_as_matrices(values: Tensor) -> Tensor:
    """Do the same as `as_matrices`, but never copy, so that writing to the result changes `values`."""
    return values.view(_matrices(values.shape))


def _matrices(shape: torch.Size) -> tuple[int, int, int]:
    return math.prod(shape[:-2]), shape[-2] if len(shape) > 1 else 1, shape[-1]


def as_blocks(matrices: Tensor, block_size: int) -> Tensor:
    """View (L, out, in) as (L, nb, block, lanes)."""
    return matrices.unflatten(-1, (-1, block_size)).permute(0, 2, 3, 1)


def split(view: Tensor) -> Iterator[Slab]:
    """Split (L, nb, block, lanes) into slabs that fit the caches.

    All slabs have the same shape, so kernels are compiled once. The two expert stacks of a gpt-oss layer share this
    shape, although they have 5760 and 2880 lanes.
    """
    if view.numel() == 0:  # for example, the inputs of an expert that gets no token
        return
    count, nb, size, lanes = view.shape
    budget = VALUES.get(view.device.type, VALUES["cuda"])
    width = _largest_divisor(lanes, LANES.get(view.device.type, LANES["cuda"]))
    rows = _largest_divisor(nb, budget // (size * width))
    experts = max(1, budget // (nb * size * lanes)) if (rows, width) == (nb, lanes) else 1
    for i in range(0, count, experts):
        for j in range(0, nb, rows):
            for k in range(0, lanes, width):
                yield slice(i, i + experts), slice(j, j + rows), slice(k, k + width)


def take(blocks: Tensor, slab: Slab) -> Tensor:
    """Take a slab of (L, nb, block, lanes).

    If lanes are contiguous, copy it. All copies have the same strides, so no kernel is compiled again.
    """
    experts, rows, lanes = slab
    part = blocks[experts, rows, :, lanes]
    return part.contiguous() if part.stride(-1) == 1 else part


def put(blocks: Tensor, slab: Slab, part: Tensor) -> None:
    experts, rows, lanes = slab
    blocks[experts, rows, :, lanes] = part


def _largest_divisor(number: int, limit: int) -> int:
    return next((n for n in range(min(number, limit), 1, -1) if number % n == 0), 1)


def put_transposed(blocks: Tensor, slab: Slab, codes: Tensor) -> None:
    """Transpose the codes of a slab, and store them in `blocks`.

    `codes` has the shape (l, rows, half, lanes), and `blocks` has the shape (L, lanes, nb, half).
    """
    experts, rows, lanes = slab
    for i, expert in enumerate(codes):
        turned = kernels.transpose(expert.reshape(-1, expert.shape[-1]))
        blocks[experts.start + i, lanes, rows] = turned.view(-1, *expert.shape[:-1])


def transpose(codes: Tensor) -> Tensor:
    """Transpose codes from (l, lanes, rows, half) to (l, rows, half, lanes). The result is contiguous."""
    count, lanes, rows, half = codes.shape
    turned = [kernels.transpose(expert.reshape(lanes, -1)).view(rows, half, lanes) for expert in codes]
    return torch.stack(turned) if count > 1 else turned[0].unsqueeze(0)
