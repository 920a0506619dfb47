"""Chooses rows: applies the shares of a blend, shuffles with a seed, and splits into training and validation.

Each row is represented by an 8-byte integer. So memory use does not depend on the size of the rows.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


def shares(available: Sequence[int], weights: Sequence[float], most: int | None) -> list[int]:
    """Compute how many rows to take from each part of a blend, in the ratio of the weights.

    The total is as large as possible: it grows until one part has no rows left.

    Args:
        available: number of rows in each part.
        weights: relative weight of each part.
        most: largest total, or None for no limit.

    Returns:
        One count per part, rounded by the method of largest remainders. Each count differs from the exact share by less
        than one row. No part gives more rows than it has.
    """
    parts = [weight / sum(weights) for weight in weights]
    # Adding 1e-9 corrects floating-point errors. For example, a part with 3 rows and a share of 0.3 allows a total of
    # 10 rows. A rounding error could make this 9.
    total = math.floor(min(count / part for count, part in zip(available, parts, strict=True)) + 1e-9)
    total = total if most is None else min(total, most)
    taken = [min(math.floor(total * part + 1e-9), count) for part, count in zip(parts, available, strict=True)]
    by_remainder = sorted(range(len(parts)), key=lambda i: taken[i] - total * parts[i])
    for i in by_remainder[: total - sum(taken)]:
        taken[i] += 1
    return taken


def choose(available: Sequence[int], take: Sequence[int], seed: int) -> Numbers:
    """Choose rows without replacement, and return their numbers in a seeded order.

    All rows are shuffled together. Then the first `take[i]` rows of each part i are chosen.

    Args:
        available: number of rows in each part. Rows are numbered consecutively across the parts.
        take: number of rows to choose from each part.
        seed: seed of the shuffle.
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
    """Split rows into training and validation. All copies of a row go to the same set.

    Args:
        identities: one number per row. Copies of a row have the same number.
        held_out: number of validation rows. The result may have a few more, because all copies of the last row are
            added.

    Returns:
        The positions of the training rows and of the validation rows, each in order.
    """
    _, first, group, sizes = np.unique(identities, return_index=True, return_inverse=True, return_counts=True)
    by_first = np.argsort(first)
    before = np.empty(len(sizes), dtype=np.int64)  # for each group of copies, the number of rows in earlier groups
    before[by_first] = np.cumsum(sizes[by_first]) - sizes[by_first]
    validates = (before < held_out)[group]
    return np.flatnonzero(~validates), np.flatnonzero(validates)
