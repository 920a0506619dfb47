"""Figures have as many digits as their uncertainty allows."""

import pytest

from pipeline.compare import digits


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.0059305, 0.0056264, 0.0062487, "0.0059 [0.0056, 0.0062]"),
        (0.5, 0.48, 0.515, "0.500 [0.480, 0.515]"),  # the half-width is 0.0175: two digits, because it begins with 1
        (4.7143, 4.6738, 4.7515, "4.71 [4.67, 4.75]"),
        (512.3, 480.0, 540.0, "512 [480, 540]"),
        (0.25, 0.25, 0.25, "0.250 [0.250, 0.250]"),
    ],
)
def test_a_value_has_the_decimals_of_its_interval(value: float, low: float, high: float, text: str) -> None:
    assert digits.show(value, low, high) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1300.36, "1300"),
        (3.4697, "3.47"),
        (0.0123, "0.0123"),
        (0.00012345, "1.23e-04"),
        (float("nan"), "nan"),
    ],
)
def test_a_value_without_an_interval_has_three_significant_digits(value: float, text: str) -> None:
    assert digits.significant(value) == text


def test_sizes_and_durations_have_the_unit_that_suits_them() -> None:
    assert [digits.size(each) for each in (463_792, 1_797_656, 12_800_000_000)] == ["0.464 MB", "1.80 MB", "12.8 GB"]
    assert [digits.duration(each) for each in (0.05, 12.0, 600.0, 9000.0)] == ["0.1 s", "12 s", "10 min", "2.5 h"]
