"""Which rows are used, and which of them are held out: shares of a blend, the seeded order, the split.

Everything here works on row numbers, 8 bytes a row, so that it does not matter how large the rows are.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


def shares(available: Sequence[int], weights: Sequence[float], most: int | None) -> list[int]:
    """How many rows to take of each part: in the ratio of the weights, as many as the scarcest part allows.

    Args:
        available: rows of each part.
        weights: of each part, relative to each other.
        most: rows to take together, or None for as many as there are.

    Returns:
        Counts by the method of largest remainders: each within one row of its exact share, none above what there is.
    """
    parts = [weight / sum(weights) for weight in weights]
    # The smallest slack keeps 3 rows of 0.3 from being 9.999 in all.
    total = math.floor(min(count / part for count, part in zip(available, parts, strict=True)) + 1e-9)
    total = total if most is None else min(total, most)
    taken = [min(math.floor(total * part + 1e-9), count) for part, count in zip(parts, available, strict=True)]
    by_remainder = sorted(range(len(parts)), key=lambda i: taken[i] - total * parts[i])
    for i in by_remainder[: total - sum(taken)]:
        taken[i] += 1
    return taken


def choose(available: Sequence[int], take: Sequence[int], seed: int) -> Numbers:
    """Numbers of the chosen rows in a seeded order; the parts' rows are numbered on, one part after the other.

    Without replacement: the first `take[i]` of part i in one random order of all rows.
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
    """Positions to train on and to validate on, in order; all copies of a row go the same way.

    Args:
        identities: of the rows, equal for copies.
        held_out: rows to validate on; a few more where the last one has copies.
    """
    _, first, group, sizes = np.unique(identities, return_index=True, return_inverse=True, return_counts=True)
    by_first = np.argsort(first)
    before = np.empty(len(sizes), dtype=np.int64)  # rows of the groups that come earlier, for each group
    before[by_first] = np.cumsum(sizes[by_first]) - sizes[by_first]
    validates = (before < held_out)[group]
    return np.flatnonzero(~validates), np.flatnonzero(validates)
