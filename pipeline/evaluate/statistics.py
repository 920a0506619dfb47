"""Compute confidence intervals and paired tests, and describe their results in words. Only this module imports scipy.

Two models are always compared on the same prompts. The tests are therefore paired: prompts on which both models have
the same result do not count. A test without a significant result does not prove that the models are equal. So a
comparison also states the smallest difference that would have been significant.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]
"""An array of shape (N), with a number or a boolean for each prompt.

The arrays of two models have the prompts in the same order.
"""

BETTER = "better"
WORSE = "worse"
_SEED = 0
_RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A comparison of a model with a reference on the same prompts.

    Attributes:
        prompts: number of prompts.
        wins: number of prompts that only the model passed.
        losses: number of prompts that only the reference passed.
        interval: confidence interval of `difference`.
        p_value: p-value of McNemar's exact test. Its null hypothesis is that wins and losses are equally likely.
    """

    prompts: int
    wins: int
    losses: int
    interval: Interval
    p_value: float

    @property
    def difference(self) -> float:
        """The model's pass rate minus the reference's."""
        return (self.wins - self.losses) / self.prompts


def wilson(passed: int, total: int, confidence: float = 0.95) -> Interval:
    """Compute Wilson's score interval (1927) of a rate.

    The interval lies in [0, 1]. Its width is positive even at 0 % and 100 %.
    """
    from scipy.stats import binomtest

    found = binomtest(passed, total).proportion_ci(confidence, method="wilson")
    return Interval(float(found.low), float(found.high))


def mean_interval(values: Values, confidence: float = 0.95) -> Interval:
    """Compute the confidence interval of the mean of at least two values.

    The method is the percentile bootstrap (Efron 1979) with a fixed seed. For a paired bootstrap, pass the
    differences between two models as values.
    """
    return _bootstrap(np.mean, confidence, values)


def ratio_interval(sums: Values, counts: Values, confidence: float = 0.95) -> Interval:
    """Compute the confidence interval of sums.sum() / counts.sum(), a mean over the values of all clusters.

    For example, each token has a value, and the tokens of an example are a cluster. The method is the percentile
    bootstrap over at least two clusters (Efron 1979) with a fixed seed.

    Args:
        sums: the sum of the values in each cluster, shape (N).
        counts: the number of values in each cluster, shape (N).
        confidence: the confidence level of the interval.
    """
    return _bootstrap(lambda total, count, axis: total.sum(axis) / count.sum(axis), confidence, sums, counts)


def _bootstrap(statistic: Callable[..., Values], confidence: float, *values: Values) -> Interval:
    """Compute the percentile interval of a statistic.

    All arrays in `values` have the shape (N). They are resampled with the same indices.
    """
    from scipy.stats import bootstrap

    found = bootstrap(
        tuple(np.asarray(each, dtype=float) for each in values),
        statistic,
        paired=len(values) > 1,
        confidence_level=confidence,
        n_resamples=_RESAMPLES,
        method="percentile",
        batch=max(1, 10_000_000 // len(values[0])),  # 80 MB of resampled values at a time
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


@cache
def mcnemar(wins: int, losses: int) -> float:
    """Compute the two-sided p-value of McNemar's exact test.

    The p-value assumes that wins and losses are equally likely. For example, 8 wins and 2 losses give the probability
    that 10 prompts split 8 to 2, 9 to 1 or 10 to 0, in either direction. scipy takes half a millisecond, and a report
    asks for the same counts many times.
    """
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def difference_interval(wins: int, losses: int, prompts: int, confidence: float = 0.95) -> Interval:
    """Compute the confidence interval of the difference between two paired rates.

    The method is the adjusted Wald interval of Bonett and Price (2012). It adds one win and one loss, so the width of
    the interval is positive even if the models never differ.
    """
    from scipy.stats import norm

    only_one, only_other = (wins + 1) / (prompts + 2), (losses + 1) / (prompts + 2)
    middle = only_one - only_other
    half = float(norm.ppf((1 + confidence) / 2)) * math.sqrt((only_one + only_other - middle**2) / (prompts + 2))
    return Interval(max(-1.0, middle - half), min(1.0, middle + half))


def compare(model: Values, reference: Values, alpha: float = 0.05) -> Comparison:
    """Compare two models on the same prompts.

    Args:
        model: whether the model passed each prompt, shape (N), bool.
        reference: whether the reference passed each prompt, shape (N), bool.
        alpha: the significance level. The confidence level of the interval is 1 - alpha.

    Raises:
        ValueError: the arrays differ in length, are empty, or are not boolean.
    """
    model, reference = np.asarray(model), np.asarray(reference)
    if model.shape != reference.shape or model.ndim != 1 or not len(model):
        raise ValueError(
            f"two one-dimensional arrays of equal length are needed, not {model.shape} and {reference.shape}"
        )
    if model.dtype != bool or reference.dtype != bool:
        raise ValueError(f"booleans are needed, not {model.dtype} and {reference.dtype}: omit undecided prompts")
    wins, losses = int((model & ~reference).sum()), int((reference & ~model).sum())
    return Comparison(
        len(model),
        wins,
        losses,
        difference_interval(wins, losses, len(model), 1 - alpha),
        mcnemar(wins, losses),
    )


def smallest_difference(differing: int, prompts: int, alpha: float = 0.05) -> float:
    """Compute the smallest difference of rates that is significant in McNemar's test (p <= alpha).

    The function assumes that the models differ on `differing` prompts. If this number is too small for a significant
    result, the function assumes the smallest number that is large enough. The result is infinite if no number up to
    `prompts` is large enough.
    """
    for count in range(differing, prompts + 1):
        # The p-value grows with the losses, so bisection finds the largest number of losses that is significant.
        found = bisect_right(range(count // 2 + 1), alpha, key=partial(_p_value, count))
        if found:
            return (count - 2 * (found - 1)) / prompts
    return math.inf


def _p_value(differing: int, losses: int) -> float:
    return mcnemar(differing - losses, losses)


def holm(p_values: Values) -> Values:
    """Correct an array of p-values, one for each test, by the method of Holm (1979).

    Count a test as significant if its corrected p-value is at most alpha. The probability of one or more false
    positives is then at most alpha.
    """
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values, kind="stable")
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected


def verdicts(comparisons: list[Comparison], alpha: float = 0.05) -> list[str]:
    """Describe comparisons in words. The p-values are corrected for the number of comparisons.

    Returns:
        One text per comparison: BETTER, WORSE, or "no significant difference on … prompts (<needed_difference>)".
    """
    p_values = holm(np.array([comparison.p_value for comparison in comparisons]))
    return [
        (BETTER if comparison.difference > 0 else WORSE)
        if p <= alpha
        else f"no significant difference on {comparison.prompts} prompts"
        f" ({needed_difference(comparison, len(comparisons), alpha)})"
        for comparison, p in zip(comparisons, p_values, strict=True)
    ]


def needed_difference(comparison: Comparison, tests: int, alpha: float = 0.05) -> str:
    """Describe the smallest difference that would be significant on the prompts of a comparison.

    Args:
        comparison: the comparison.
        tests: number of comparisons that the p-values are corrected for.
        alpha: level of significance.
    """
    # Holm compares the smallest p-value with this level. A p-value up to this level is always significant.
    strictest = alpha / max(1, tests)
    smallest = smallest_difference(comparison.wins + comparison.losses, comparison.prompts, strictest)
    return "too few for any" if math.isinf(smallest) else f"at least {100 * smallest:.1f} points are needed"


def verdict(model: Values, reference: Values, alpha: float = 0.05) -> str:
    """Describe one comparison in words. Arguments and errors are the same as for `compare`."""
    return verdicts([compare(model, reference, alpha)], alpha)[0]
