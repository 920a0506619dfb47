"""Plots as SVG: every series has something to see."""

from pipeline.compare.charts import Chart, Point, Series
from pipeline.compare.plots import draw


def drawn(training: list[Point]) -> str:
    series = [
        Series("validation", [Point(1, 1.0), Point(3, 3.0)]),
        Series("training", training, is_secondary=True),
    ]
    return draw([Chart("loss", "Losses", "", "lines", "step", "loss", series)])["loss"].svg


def test_a_single_point_of_a_line_without_markers_is_marked() -> None:
    one, line = drawn([Point(2, 2.0)]), drawn([Point(2, 2.0), Point(2, 2.0)])
    assert one.count("<use ") == line.count("<use ") + 2  # the point, and its mark in the legend
