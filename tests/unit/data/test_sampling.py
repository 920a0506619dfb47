"""Shares of a blend, the seeded choice of rows, and the split. All of them work on row numbers."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from pipeline.data import sampling

BLENDS: list[tuple[list[int], list[float], int | None]] = [
    ([100], [1.0], None),
    ([100], [7.0], 30),
    ([100, 100], [1.0, 1.0], None),
    ([100, 30], [1.0, 3.0], None),
    ([1000, 1000, 1000], [0.3, 0.3, 0.4], 10),
    ([10, 10, 10], [1.0, 1.0, 1.0], 10),
    ([7, 11, 13], [0.2, 0.5, 0.3], None),
    ([3, 1_000_000], [0.1, 0.9], None),
]


@pytest.mark.parametrize(("available", "weights", "most"), BLENDS)
def test_shares_are_within_a_row_of_the_weights(available: list[int], weights: list[float], most: int | None) -> None:
    taken = sampling.shares(available, weights, most)
    total = sum(taken)
    exact = [total * Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights) for weight in weights]
    assert all(abs(count - share) < 1 for count, share in zip(taken, exact, strict=True))
    assert all(0 <= count <= there for count, there in zip(taken, available, strict=True))


@pytest.mark.parametrize(("available", "weights", "most"), BLENDS)
def test_no_larger_blend_has_these_shares(available: list[int], weights: list[float], most: int | None) -> None:
    total = sum(sampling.shares(available, weights, most))
    shares = [Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights) for weight in weights]
    fits = all((total + 1) * share <= there for share, there in zip(shares, available, strict=True))
    assert total == most or not fits
    assert total <= (most or total)


def test_one_data_set_is_used_whole() -> None:
    assert sampling.shares([41], [0.1], None) == [41]


def test_the_requested_number_of_each_part_is_chosen_without_replacement() -> None:
    chosen = sampling.choose([50, 100, 7], [20, 10, 7], seed=3)
    assert len(set(chosen.tolist())) == 37
    parts = Counter("abc"[int(np.searchsorted([50, 150], number, side="right"))] for number in chosen)
    assert parts == {"a": 20, "b": 10, "c": 7}


def test_the_choice_is_the_same_every_time_and_changes_with_the_seed() -> None:
    first, again, other = (sampling.choose([50, 50], [20, 10], seed).tolist() for seed in (1, 1, 2))
    assert first == again
    assert set(first) != set(other)


def test_the_parts_are_mixed() -> None:
    chosen = sampling.choose([500, 500], [500, 500], seed=0)
    assert 200 < (chosen[:500] < 500).sum() < 300


def test_a_larger_share_keeps_the_rows_of_a_smaller_one() -> None:
    assert set(sampling.choose([50, 50], [20, 10], 5)) < set(sampling.choose([50, 50], [30, 10], 5))


def split(identities: list[int], held_out: int) -> tuple[list[int], list[int]]:
    train, validation = sampling.split(np.array(identities, dtype=np.int64), held_out)
    return train.tolist(), validation.tolist()


def test_the_first_rows_are_held_out() -> None:
    assert split([5, 3, 4, 1], 2) == ([2, 3], [0, 1])


def test_copies_go_the_same_way() -> None:
    assert split([5, 3, 5, 1, 5], 1) == ([1, 3], [0, 2, 4])
    assert split([5, 3, 5, 1, 3], 2) == ([1, 3, 4], [0, 2])


def test_nothing_or_everything_can_be_held_out() -> None:
    assert split([1, 2], 0) == ([0, 1], [])
    assert split([1, 2], 2) == ([], [0, 1])
