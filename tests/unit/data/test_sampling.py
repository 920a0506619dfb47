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


def split(groups: list[int], held_out: int, rows: list[int] | None = None) -> tuple[list[int], list[int]]:
    """Split rows of these groups. By default, the rows are in the order of their numbers."""
    numbers = np.array(range(len(groups)) if rows is None else rows, dtype=np.int64)
    train, validation = sampling.split(np.array(groups, dtype=np.int64), numbers, held_out)
    return train.tolist(), validation.tolist()


def test_the_first_rows_are_held_out() -> None:
    assert split([5, 3, 4, 1], 2) == ([2, 3], [0, 1])


@pytest.mark.parametrize("seed", range(20))
def test_rows_without_a_common_group_are_split_as_they_are_ordered(seed: int) -> None:
    """The split of data without repeated prompts is the same as in runs that were made before prompts mattered."""
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 200))
    rows = sampling.choose([300], [count], seed)
    groups = generator.permutation(10**6)[:count] - 500_000
    for held_out in {0, 1, count // 10, count // 2, count - 1, count}:
        train, validation = sampling.split(groups, rows, held_out)
        assert validation.tolist() == list(range(held_out))
        assert train.tolist() == list(range(held_out, count))


def test_a_group_goes_the_same_way() -> None:
    assert split([5, 3, 5, 1, 5], 3) == ([1, 3], [0, 2, 4])
    assert split([5, 3, 5, 1, 3], 2) == ([1, 3, 4], [0, 2])


def test_a_group_that_is_too_large_is_passed_over() -> None:
    assert split([5, 3, 5, 1, 5], 1) == ([0, 2, 3, 4], [1])
    assert split([5, 5, 5, 5, 5, 5, 5, 3, 3, 1], 3) == ([0, 1, 2, 3, 4, 5, 6], [7, 8, 9])


def test_if_every_group_is_too_large_the_smallest_is_held_out() -> None:
    assert split([5, 5, 5, 3, 3, 5, 5, 3, 3], 1) == ([0, 1, 2, 5, 6], [3, 4, 7, 8])


def test_something_is_left_to_train_on() -> None:
    assert split([1, 1, 1, 2], 3) == ([3], [0, 1, 2])
    assert split([1, 2, 2, 2], 3) == ([1, 2, 3], [0])
    assert split([1, 1, 1], 2) == ([0, 1, 2], [])


def test_nothing_or_everything_can_be_held_out() -> None:
    assert split([1, 2], 0) == ([0, 1], [])
    assert split([1, 2], 2) == ([], [0, 1])


@pytest.mark.parametrize("seed", range(10))
def test_the_share_is_met_to_within_half_of_the_largest_group(seed: int) -> None:
    generator = np.random.default_rng(seed)
    groups = generator.integers(0, 150, 1000)
    train, validation = sampling.split(groups, generator.permutation(1000), 100)
    assert abs(len(validation) - 100) <= np.bincount(groups).max() / 2
    assert not {*groups[train].tolist()} & {*groups[validation].tolist()}
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(1000))


def test_a_large_group_is_not_held_out_more_often_than_a_small_one() -> None:
    groups = np.array([0] * 20 + [*range(1, 81)])
    held_out = 0
    for seed in range(300):
        rows = np.random.default_rng(seed).permutation(100)
        _, validation = sampling.split(groups[rows], rows, 30)
        held_out += 0 in groups[rows][validation]
    # Of 81 groups, about 30 of 100 rows are held out. The first row of a large group would almost always be among them.
    assert 60 < held_out < 120
