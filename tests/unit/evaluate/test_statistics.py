"""Intervals and paired tests, compared with scipy, statsmodels, exact sums and simulation."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluate import statistics
from pipeline.evaluate.statistics import (
    BETTER,
    WORSE,
    compare,
    holm,
    mcnemar,
    mean_interval,
    ratio_interval,
    smallest_difference,
    wilson,
)


def outcomes(both: int, wins: int, losses: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Make two arrays. They say which prompts the model passed, and which prompts the reference passed.

    Args:
        both: number of prompts that both passed.
        wins: number of prompts that only the model passed.
        losses: number of prompts that only the reference passed.
        neither: number of prompts that both failed.
    """
    kinds = ((True, True, both), (True, False, wins), (False, True, losses), (False, False, neither))
    model, reference = zip(*(pair for one, other, count in kinds for pair in [(one, other)] * count), strict=True)
    return np.array(model), np.array(reference)


def test_98_of_100_has_the_published_wilson_interval() -> None:
    found = wilson(98, 100)
    assert (round(found.low, 3), round(found.high, 3)) == (0.930, 0.994)


@pytest.mark.parametrize(("passed", "total"), [(0, 10), (10, 10), (3, 7), (500, 1000)])
def test_wilsons_bounds_are_where_the_score_test_becomes_significant(passed: int, total: int) -> None:
    found, z = wilson(passed, total), stats.norm.ppf(0.975)
    for bound in (found.low, found.high):
        if 1e-12 < bound < 1 - 1e-12:
            score = (passed / total - bound) / math.sqrt(bound * (1 - bound) / total)
            assert abs(score) == pytest.approx(z)


@pytest.mark.parametrize(("passed", "total"), [(0, 10), (10, 10), (3, 7), (500, 1000)])
def test_wilson_equals_statsmodels(passed: int, total: int) -> None:
    from statsmodels.stats.proportion import proportion_confint

    expected = proportion_confint(passed, total, method="wilson")
    assert (wilson(passed, total).low, wilson(passed, total).high) == pytest.approx(expected)


def test_the_bootstrap_of_normal_values_is_near_the_t_interval() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, 400)
    found = mean_interval(values)
    expected = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, abs=0.03)


def test_the_bootstrap_is_the_same_each_time() -> None:
    values = np.random.default_rng(2).normal(size=30)
    assert mean_interval(values) == mean_interval(values)


@pytest.mark.parametrize(("wins", "losses"), [*product(range(5), range(5)), (30, 12), (200, 260)])
def test_mcnemar_sums_the_probabilities_of_splits_at_least_as_uneven(wins: int, losses: int) -> None:
    count, least = wins + losses, min(wins, losses)
    tail = sum(math.comb(count, i) for i in range(least + 1)) / 2**count
    assert mcnemar(wins, losses) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_equals_statsmodels() -> None:
    from statsmodels.stats import contingency_tables as tables

    for wins, losses in ((0, 6), (3, 11), (40, 22)):
        assert mcnemar(wins, losses) == pytest.approx(tables.mcnemar([[7, wins], [losses, 5]], exact=True).pvalue)


def test_the_interval_of_a_difference_has_its_nominal_coverage() -> None:
    generator = np.random.default_rng(3)
    chances, truth = (0.6, 0.2, 0.1, 0.1), 0.1
    held = 0
    for both, wins, losses, neither in generator.multinomial(80, chances, 2000):
        found = statistics.difference_interval(wins, losses, both + wins + losses + neither)
        held += found.low <= truth <= found.high
    assert 0.94 <= held / 2000 <= 0.97


def test_the_interval_is_not_empty_if_models_never_differ() -> None:
    found = compare(*outcomes(20, 0, 0, 0))
    assert found.p_value == 1.0
    assert found.interval.low < 0 < found.interval.high


def test_holm_gives_the_published_example() -> None:
    # The products are 0.01 * 4, 0.02 * 3, 0.03 * 2 and 0.04 * 1. The last product, 0.04, is smaller than the third,
    # 0.06. So Holm's method raises it to 0.06.
    assert holm(np.array([0.02, 0.01, 0.04, 0.03])) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_holm_equals_statsmodels() -> None:
    from statsmodels.stats import multitest

    p_values = np.random.default_rng(4).uniform(0, 0.2, 9)
    assert holm(p_values) == pytest.approx(multitest.multipletests(p_values, method="holm")[1])


def test_holm_stays_below_one_and_accepts_no_tests() -> None:
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]
    assert holm(np.array([])).tolist() == []


@pytest.mark.parametrize(
    ("wins", "losses", "said"),
    [
        (6, 0, BETTER),
        (0, 6, WORSE),
        (5, 0, "no significant difference on 100 prompts (at least 6.0 points are needed)"),
    ],
)
def test_a_significant_difference_needs_at_least_six_prompts_of_one_kind(wins: int, losses: int, said: str) -> None:
    """If one model wins all n prompts on which the two models differ, p = 2 / 2^n.

    For n = 6, p is 0.031. For n = 5, p is 0.0625.
    """
    assert statistics.verdict(*outcomes(94 - losses, wins, losses, 6 - wins)) == said


def test_fewer_than_six_prompts_are_never_significant() -> None:
    said = statistics.verdict(*outcomes(0, 5, 0, 0))
    assert said == "no significant difference on 5 prompts (too few for any)"


@pytest.mark.parametrize("differing", [0, 5, 6, 7, 20, 101])
def test_the_smallest_difference_is_just_significant(differing: int) -> None:
    smallest = round(smallest_difference(differing, 200) * 200)
    count = max(differing, 6)
    losses = (count - smallest) // 2
    assert mcnemar(count - losses, losses) <= 0.05 < mcnemar(count - losses - 1, losses + 1)


def test_several_comparisons_need_a_larger_difference_than_one() -> None:
    comparison = compare(*outcomes(50, 6, 0, 50))
    assert statistics.verdicts([comparison]) == [BETTER]
    said = statistics.verdicts([comparison, comparison])
    assert said == ["no significant difference on 106 prompts (at least 6.6 points are needed)"] * 2


def test_the_difference_is_that_of_the_pass_rates() -> None:
    model, reference = outcomes(10, 7, 3, 5)
    assert compare(model, reference).difference == pytest.approx(model.mean() - reference.mean())


@pytest.mark.parametrize(
    ("model", "reference"), [([True], [True, False]), ([], []), ([True, None], [True, True]), ([0.5], [0.5])]
)
def test_what_cannot_be_paired_is_an_error(model: list, reference: list) -> None:
    with pytest.raises(ValueError):
        compare(np.array(model), np.array(reference))


def test_the_interval_of_a_ratio_with_equal_counts_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=50)
    expected = mean_interval(values)
    found = ratio_interval(3 * values, np.full(50, 3))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_the_interval_of_a_ratio_covers_the_truth_where_counts_go_with_values() -> None:
    generator, covered = np.random.default_rng(0), 0
    for _ in range(100):
        counts = generator.integers(1, 100, size=60)
        means = np.where(counts > 50, 2.0, 1.0) + generator.normal(
            scale=0.5, size=60
        )  # large clusters have larger means
        found = ratio_interval(means * counts, counts)
        covered += found.low <= (2.0 * sum(range(51, 100)) + sum(range(1, 51))) / sum(range(1, 100)) <= found.high
    assert 88 <= covered <= 100
