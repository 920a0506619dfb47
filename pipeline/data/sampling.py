"""The choice of rows: shares of a blend, the seeded order, and the split into training and validation.

All functions work on row numbers, 8 bytes a row. So the size of the rows does not matter.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


def shares(available: Sequence[int], weights: Sequence[float], most: int | None) -> list[int]:
    """Compute how many rows to take from each part of a blend, in the ratio of the weights.

    The total is as large as the scarcest part allows.

    Args:
        available: number of rows in each part.
        weights: relative weight of each part.
        most: largest total, or None for no limit.

    Returns:
        One count per part, by the method of largest remainders. Each count is within one row of its exact share and
        never above the part's number of rows.
    """
    parts = [weight / sum(weights) for weight in weights]
    # Without the slack of 1e-9, 3 rows at a share of 0.3 would allow a total of 9.999.
    total = math.floor(min(count / part for count, part in zip(available, parts, strict=True)) + 1e-9)
    total = total if most is None else min(total, most)
    taken = [min(math.floor(total * part + 1e-9), count) for part, count in zip(parts, available, strict=True)]
    by_remainder = sorted(range(len(parts)), key=lambda i: taken[i] - total * parts[i])
    for i in by_remainder[: total - sum(taken)]:
        taken[i] += 1
    return taken


def choose(available: Sequence[int], take: Sequence[int], seed: int) -> Numbers:
    """Choose rows without replacement, and return their numbers in a seeded order.

    All rows get one random order. The first `take[i]` rows of part i in that order are chosen.

    Args:
        available: number of rows in each part. Row numbers continue from one part to the next.
        take: number of rows to choose from each part.
        seed: seed of the order.
    """
    import torch

    order = torch.randperm(sum(available), generator=torch.Generator().manual_seed(seed)).numpy()
    first = np.cumsum([0, *available])
    part = np.searchsorted(first, order, side="right") - 1
    kept = np.zeros(len(order), dtype=bool)
    for i, count in enumerate(take):
        kept[np.flatnonzero(part == i)[:count]] = True
    return order[kept]


def split(identities: Numbers, held_out: int) -> tuple[Numbers, Numbers]:
    """Split rows into training and validation. All copies of a row go to the same side.

    Args:
        identities: one number per row, equal for copies.
        held_out: number of validation rows. The copies of the last one may add a few.

    Returns:
        The positions of the training rows and of the validation rows, each in order.
    """
    _, first, group, sizes = np.unique(identities, return_index=True, return_inverse=True, return_counts=True)
    by_first = np.argsort(first)
    before = np.empty(len(sizes), dtype=np.int64)  # for each group of copies: rows in earlier groups
    before[by_first] = np.cumsum(sizes[by_first]) - sizes[by_first]
    validates = (before < held_out)[group]
    return np.flatnonzero(~validates), np.flatnonzero(validates)
