"""The padding of a batch follows from the measured lengths. The expected values are computed by hand."""

from typing import Any

import pytest
from test_doctor import HEALTHY

from pipeline.doctor.lengths import Amounts, LengthDistribution, amounts_of
from pipeline.doctor.rows import Lengths

EVEN = LengthDistribution((0.0, 1.0), (0.0, 100.0))  # every length from 0 to 100 is equally likely


def measured(**changes: Any) -> Lengths:
    found: Lengths = {
        "shortest": 10,
        "median": 50,
        "p95": 100,
        "longest": 200,
        "histogram": {"64": 8, "128": 1, "256": 1},
    }
    return {**found, **changes}  # type: ignore[typeddict-item]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_examples_of_one_length_have_no_padding(count: int) -> None:
    assert LengthDistribution().longest_of(count) == (1, 1)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_longest_of_n_even_lengths_is_n_of_n_plus_1(count: int) -> None:
    mean, weighted = EVEN.longest_of(count)
    assert mean == pytest.approx(count / (count + 1) / 0.5, rel=0.01)
    assert weighted == pytest.approx(count / (count + 2) / (count / (count + 1)) / 0.5, rel=0.01)


def test_the_distribution_has_the_measured_percentiles() -> None:
    found = LengthDistribution.of(measured(), limit=1000)
    assert [found.quantile(share) for share in (0, 0.5, 0.8, 0.95, 1)] == [10, 50, 64, 100, 200]
    assert found.quantile(0.25) == 30


def test_the_edge_of_a_bin_is_no_longer_than_later_percentiles() -> None:
    found = LengthDistribution.of(measured(histogram={"256": 4, "512": 6}), limit=1000)
    assert found.quantile(0.4) == 50 and found.quantile(1) == 200


def test_longer_examples_are_cut_to_the_limit() -> None:
    assert LengthDistribution.of(measured(), limit=60).quantile(1) == 60


def test_held_out_rows_have_their_share_of_the_tokens() -> None:
    data: Any = HEALTHY
    found = amounts_of(data, prompts=3)
    assert found == Amounts(360, 36000, 40, 4000, 3, 0.2, LengthDistribution.of(HEALTHY["lengths"], 4096))


def test_validation_rows_of_their_own_have_their_own_tokens() -> None:
    own = {"tokens": {"examples": 40, "all": 9000}, "cut": {"tokens_lost": 1000}}
    data: Any = {**HEALTHY, "validation": own}
    found = amounts_of(data, prompts=0)
    assert (found.train_tokens, found.validation_tokens, found.validation_mean) == (32000, 8000, 200)
