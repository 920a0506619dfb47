"""Estimates over seeds with 95 % intervals. Seeds are independent, so the intervals follow from Student's t.

Means have the t-interval. Shares are ratios of two means, and have Fieller's interval (Fieller 1954, "Some problems in
interval estimation"), which is the t-interval for a ratio. A mean of the seeds' own ratios would be ruled by the seeds
whose denominator happens to be small.
"""

import math
import statistics
from dataclasses import dataclass

from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """An estimate from several seeds.

    Attributes:
        mean: the estimate.
        low: lower end of the interval. None if the interval is unbounded or if there is only one seed.
        high: upper end of the interval, or None.
    """

    mean: float
    low: float | None = None
    high: float | None = None

    def show(self, digits: int, factor: float = 1.0) -> str:
        """Return the estimate and its interval as text, both multiplied by `factor`."""
        mean = _fixed(factor * self.mean, digits)
        if self.low is None or self.high is None:
            return f"{mean} [unbounded]"
        return f"{mean} [{_fixed(factor * self.low, digits)}, {_fixed(factor * self.high, digits)}]"


def estimate(values: list[float]) -> Estimate:
    """Estimate a mean from one value for each seed."""
    count, mean = len(values), statistics.mean(values)
    if count < 2:
        return Estimate(mean)
    margin = _quantile(count) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean, mean - margin, mean + margin)


def estimate_ratio(over: list[float], under: list[float]) -> Estimate:
    """Estimate mean(over) / mean(under) from pairs of values, one pair for each seed.

    The interval is unbounded if mean(under) does not differ significantly from zero.
    """
    count, top, bottom = len(over), statistics.mean(over), statistics.mean(under)
    ratio = top / bottom
    if count < 2:
        return Estimate(ratio)
    top_variance, bottom_variance = (statistics.variance(each) / count for each in (over, under))
    covariance = statistics.covariance(over, under) / count
    factor = (_quantile(count) / bottom) ** 2
    rest = 1 - factor * bottom_variance
    if rest <= 0:
        return Estimate(ratio)
    center = (ratio - factor * covariance) / rest
    spread = top_variance - 2 * ratio * covariance + ratio**2 * bottom_variance
    spread -= factor * (top_variance * bottom_variance - covariance**2)
    margin = math.sqrt(factor * max(0.0, spread)) / rest
    return Estimate(ratio, center - margin, center + margin)


def _quantile(count: int) -> float:
    return float(student.ppf((1 + CONFIDENCE) / 2, count - 1))


def _fixed(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")
