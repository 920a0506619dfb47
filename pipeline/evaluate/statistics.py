"""What figures of a sample can show: intervals, paired tests, and words for them. The only importer of scipy.

Models are compared on the same prompts, so tests are paired: what counts are the prompts on which two models differ.
Not to see a difference is no proof that there is none, so a comparison also says which difference it could have seen.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]
"""(N) numbers or booleans, one for each prompt; of two models, in the same order of prompts."""

BETTER = "better"
WORSE = "worse"
_SEED = 0
_RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """Bounds of what is estimated, at a level of confidence."""

    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A model against a reference, on the same prompts.

    Attributes:
        prompts: N.
        wins: prompts on which only the model passed.
        losses: prompts on which only the reference passed.
        interval: of `difference`.
        p_value: of McNemar's exact test that wins and losses are equally likely.
    """

    prompts: int
    wins: int
    losses: int
    interval: Interval
    p_value: float

    @property
    def difference(self) -> float:
        """The model's pass rate less the reference's."""
        return (self.wins - self.losses) / self.prompts


def wilson(passed: int, total: int, confidence: float = 0.95) -> Interval:
    """Interval of a rate (Wilson 1927, score interval): within 0 and 1, and not empty at 0 % and 100 %."""
    from scipy.stats import binomtest

    found = binomtest(passed, total).proportion_ci(confidence, method="wilson")
    return Interval(float(found.low), float(found.high))


def mean_interval(values: Values, confidence: float = 0.95) -> Interval:
    """Interval of the mean of at least two values, by bootstrap (percentiles; Efron 1979), with a fixed seed.

    For a difference between two models hand in the differences: that is the paired bootstrap.
    """
    return _bootstrap(np.mean, confidence, values)


def ratio_interval(sums: Values, counts: Values, confidence: float = 0.95) -> Interval:
    """Interval of sums.sum() / counts.sum(), such as a mean over tokens that come in clusters, at least two of them.

    By bootstrap over the clusters (percentiles; Efron 1979), with a fixed seed.

    Args:
        sums: (N), of each cluster.
        counts: (N), of what was summed.
        confidence: level.
    """
    return _bootstrap(lambda total, count, axis: total.sum(axis) / count.sum(axis), confidence, sums, counts)


def _bootstrap(statistic: Callable[..., Any], confidence: float, *values: Values) -> Interval:
    """Of a statistic of values that are drawn together, each (N)."""
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


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided p-value of McNemar's exact test: the chance of so uneven a split of the prompts that differ."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def difference_interval(wins: int, losses: int, prompts: int, confidence: float = 0.95) -> Interval:
    """Interval of a difference of paired rates: the adjusted Wald interval of Bonett and Price (2012).

    It adds one prompt to the wins and one to the losses, so it is not empty where the models never differ.
    """
    from scipy.stats import norm

    only_one, only_other = (wins + 1) / (prompts + 2), (losses + 1) / (prompts + 2)
    middle = only_one - only_other
    half = float(norm.ppf((1 + confidence) / 2)) * math.sqrt((only_one + only_other - middle**2) / (prompts + 2))
    return Interval(max(-1.0, middle - half), min(1.0, middle + half))


def compare(model: Values, reference: Values, alpha: float = 0.05) -> Comparison:
    """Compare booleans of two models, each (N): whether they passed the same prompts.

    Raises:
        ValueError: the arrays differ in length, are empty, or are not boolean.
    """
    model, reference = np.asarray(model), np.asarray(reference)
    if model.shape != reference.shape or model.ndim != 1 or not len(model):
        raise ValueError(f"two rows of equal length are needed, not {model.shape} and {reference.shape}")
    if model.dtype != bool or reference.dtype != bool:
        raise ValueError(f"booleans are needed, not {model.dtype} and {reference.dtype}: leave undecided prompts out")
    wins, losses = int((model & ~reference).sum()), int((reference & ~model).sum())
    return Comparison(
        len(model),
        wins,
        losses,
        difference_interval(wins, losses, len(model), 1 - alpha),
        mcnemar(wins, losses),
    )


def smallest_difference(differing: int, prompts: int, alpha: float = 0.05) -> float:
    """The smallest difference of rates that McNemar's test would have seen (p <= alpha).

    With `differing` prompts on which the models differ, or, where those are too few for the test to see any difference,
    with as few as it takes; infinite where not even all prompts are enough.
    """
    for count in range(differing, prompts + 1):
        for losses in range(count // 2, -1, -1):
            if mcnemar(count - losses, losses) <= alpha:
                return (count - 2 * losses) / prompts
    return math.inf


def holm(p_values: Values) -> Values:
    """p-values (M) corrected for M tests (Holm 1979): the chance that any of them errs stays below the level."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values, kind="stable")
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected


def verdicts(comparisons: list[Comparison], alpha: float = 0.05) -> list[str]:
    """In words, each of several comparisons: BETTER, WORSE, or what could not be shown; corrected for their number."""
    p_values = holm(np.array([comparison.p_value for comparison in comparisons]))
    strictest = alpha / max(1, len(comparisons))  # Holm's level for the smallest p-value: seen by it is always shown
    return [
        (BETTER if comparison.difference > 0 else WORSE) if p <= alpha else _nothing_shown(comparison, strictest)
        for comparison, p in zip(comparisons, p_values, strict=True)
    ]


def verdict(model: Values, reference: Values, alpha: float = 0.05) -> str:
    """In words, one comparison; arguments and errors are those of `compare`."""
    return verdicts([compare(model, reference, alpha)], alpha)[0]


def _nothing_shown(comparison: Comparison, alpha: float) -> str:
    smallest = smallest_difference(comparison.wins + comparison.losses, comparison.prompts, alpha)
    needed = "they are too few for any" if math.isinf(smallest) else f"it would have to be {100 * smallest:.1f} points"
    return f"no difference that {comparison.prompts} prompts can show: {needed}"
