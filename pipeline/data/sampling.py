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


def split(groups: Numbers, rows: Numbers, held_out: int) -> tuple[Numbers, Numbers]:
    """Split rows into training and validation. All rows of a group go to the same set.

    The groups are visited in a random order: the order of their rows with the lowest number. So a large group is not
    chosen more often than a small one. A group is held out if this brings the number of validation rows closer to
    `held_out`. So the number differs by at most half of the largest group, with two exceptions. If every group is too
    large, the smallest one is held out. If all groups would be held out, the last one is trained on. If each row is a
    group of its own, the first `held_out` rows are held out.

    Args:
        groups: number of each row's group. Rows are in a random order.
        rows: number of each row in the data set.
        held_out: number of validation rows.

    Returns:
        The positions of the training rows and of the validation rows, each in order.
    """
    _, group = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group)
    by_number = np.argsort(rows)
    _, lowest = np.unique(group[by_number], return_index=True)
    order = np.argsort(by_number[lowest])  # groups, by the position of their row with the lowest number
    chosen = _fill(sizes[order].tolist(), held_out, keeps_one=held_out < len(rows))
    validates = np.isin(group, order[chosen])
    return np.flatnonzero(~validates), np.flatnonzero(validates)


def _fill(sizes: list[int], wanted: int, keeps_one: bool) -> list[int]:
    """Choose groups whose sizes add up to about `wanted`. If `keeps_one`, at least one group is not chosen."""
    chosen: list[int] = []
    total = 0
    for i, size in enumerate(sizes):
        if total >= wanted or (keeps_one and len(chosen) == len(sizes) - 1):
            break
        if abs(total + size - wanted) <= abs(total - wanted):
            chosen.append(i)
            total += size
    if not chosen and wanted and len(sizes) > 1:
        return [sizes.index(min(sizes))]
    return chosen
