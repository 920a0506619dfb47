"""Write figures with as many digits as they deserve."""

import math

_DIGITS = 3  # significant digits of a value without an interval


def decimals_of(half_width: float) -> int:
    """Return how many decimals a value needs, given half the width of its interval. The width is above 0 and finite.

    The half-width keeps one significant digit, or two if it begins with 1. Rounding then hides no difference that the
    interval could show.
    """
    exponent = math.floor(math.log10(half_width))
    return max(0, -exponent + (half_width / 10**exponent < 2))


def show(value: float, low: float | None = None, high: float | None = None, unit: str = "") -> str:
    """Write a value, with its interval if there is one, such as `0.0059 [0.0056, 0.0062]`.

    A value without an interval, or with an interval of width 0, has three significant digits.
    """
    if low is None or high is None:
        return f"{significant(value)}{unit}"
    if high == low or not math.isfinite(high - low):
        return f"{significant(value)}{unit} [{significant(low)}, {significant(high)}]"
    decimals = decimals_of((high - low) / 2)
    return f"{value:.{decimals}f}{unit} [{low:.{decimals}f}, {high:.{decimals}f}]"


def significant(value: float) -> str:
    """Write a value with three significant digits, and large numbers in full."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-3:
        return f"{value:.{_DIGITS - 1}e}"
    return f"{value:.{max(0, _DIGITS - 1 - math.floor(math.log10(abs(value))))}f}"


def size(count: float) -> str:
    """Write a number of bytes in GB or MB, with three significant digits."""
    return f"{significant(count / 1e9)} GB" if count >= 1e9 else f"{significant(count / 1e6)} MB"


def duration(seconds: float) -> str:
    """Write a duration in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
