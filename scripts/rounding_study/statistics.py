"""Means over seeds with 95 % intervals. The intervals are Student's t-intervals: the seeds are independent."""

import math
import statistics
from dataclasses import dataclass

from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: the mean.
        margin: half of the width of the interval. None for one seed.
    """

    mean: float
    margin: float | None

    @property
    def low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.margin is None else self.mean - self.margin

    @property
    def high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.margin is None else self.mean + self.margin

    def show(self, digits: int, factor: float = 1.0) -> str:
        """Return the mean and the interval as text, both multiplied by `factor`."""
        mean = _fixed(factor * self.mean, digits)
        if self.low is None or self.high is None:
            return mean
        return f"{mean} [{_fixed(factor * self.low, digits)}, {_fixed(factor * self.high, digits)}]"


def estimate(values: list[float]) -> Estimate:
    """Estimate a mean from the values of the seeds."""
    count = len(values)
    if count < 2:
        return Estimate(values[0], None)
    margin = float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(statistics.mean(values), margin)


def _fixed(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")
