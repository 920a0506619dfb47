"""Draw the charts as PNG, and as SVG in the page's colours. Only this module imports matplotlib.

The same chart always gives the same bytes, because the output contains no date and no program name. Series differ in
marker and line as well as in colour. The colours are from Okabe and Ito (2008); colour-blind people can
distinguish them.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from io import BytesIO, StringIO
from itertools import cycle
from typing import Any, TypeAlias

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.compare.charts import Chart, Point
from pipeline.compare.digits import size

_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_INK, _FAINT, _PAPER = "#1a1a1b", "#d0d0d1", "#fffffe"
_ROLES = {_INK: "currentColor", _FAINT: "var(--faint)", _PAPER: "var(--paper)"}
_ROLES |= {colour: f"var(--series-{i})" for i, colour in enumerate(_PALETTE, 1)}
"""Colour in the PNG -> CSS value that replaces it in the SVG. The page's style sheet defines the variables."""

_WIDTH_INCHES, _HEIGHT_INCHES = 4.6, 3.0  # as wide as a phone, so that letters keep their size there
_LINE_INCHES = 0.17  # height of one line of dots, and of one line of the legend
_PNG_DPI = 150
_LONGEST_NAME = 20
_LEGEND_LETTERS = 62  # letters in one line of the legend
_SAME_PLACE = 0.03  # points closer than this share of the points' range, on both axes, get a common label
_Place: TypeAlias = tuple[float, float]
"""Position of a point on the two axes."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # names may contain dollar signs, which are not formulas
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.titlesize": 9,
    **{f"{part}.color": _INK for part in ("text", "xtick", "ytick")},
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "grid.color": _FAINT,
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Plot:
    """A drawn chart.

    Attributes:
        png: contents of a PNG file, with a white background.
        svg: <svg> element for a page that defines --faint, --paper and --series-1 to --series-7.
    """

    png: bytes
    svg: str


def draw(charts: Iterable[Chart]) -> dict[str, Plot]:
    """Draw charts, and return the plots by the charts' names."""
    return {chart.name: _plot(chart) for chart in charts}


def _plot(chart: Chart) -> Plot:
    png, svg = BytesIO(), StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": chart.name}):
        figure = _draw(chart)
        figure.savefig(png, format="png", dpi=_PNG_DPI, facecolor="white", metadata={"Software": None})
        figure.set_layout_engine(None)  # the SVG keeps the layout of the PNG, which takes long to compute
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=no_metadata)
    return Plot(png.getvalue(), _in_colours_of_page(svg.getvalue(), chart))


def _in_colours_of_page(drawn: str, chart: Chart) -> str:
    """Return the <svg> element of an SVG file. Its colours are variables of the page, and its ids are unique there."""
    element = drawn[drawn.index("<svg") :]
    for colour, role in _ROLES.items():
        element = element.replace(colour, role)
    # A page contains several charts. Each id starts with the chart's name, so that it is unique.
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{chart.name}-", element)
    label = f"<title>{escape(chart.title)}</title><desc>{escape(chart.description)}</desc>"
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img">{_escape_backslashes(label)}', element, count=1
    )


def _escape_backslashes(text: str) -> str:
    """Escape the backslashes of a replacement text, so that `re.sub` inserts it unchanged."""
    return text.replace("\\", "\\\\")


def _draw(chart: Chart) -> Figure:
    shown = [series for series in chart.series if series.points]
    longest = max(len(series.name) for series in shown)
    columns = max(1, min(4, len(shown), _LEGEND_LETTERS // (longest + 5)))
    height = _HEIGHT_INCHES if chart.kind != "dots" else 0.9 + _LINE_INCHES * max(8, _count_lines(chart))
    figure = Figure(figsize=(_WIDTH_INCHES, height + _LINE_INCHES * (len(shown) // columns)), layout="constrained")
    axes = figure.add_subplot()
    _KINDS[chart.kind](axes, chart)
    _label(axes, chart)
    if len(shown) > 1:
        figure.legend(loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def _label(axes: Axes, chart: Chart) -> None:
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    if chart.is_share:
        axis = axes.xaxis if chart.kind == "dots" else axes.yaxis
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.grid(axis="x" if chart.kind == "dots" else "y", linewidth=0.6)
    axes.set_axisbelow(True)


def _count_lines(chart: Chart) -> int:
    """Count the lines that a plot of dots needs.

    A name needs one line for each of its points, and one empty line. A long name that is wrapped may need more lines.
    """
    points = Counter(point.at for series in chart.series for point in series.points)
    return sum(max(count + 1, 1 + _wrap(str(name)).count("\n")) for name, count in points.items())


def _names(chart: Chart) -> list[float | str]:
    return list(dict.fromkeys(point.at for series in chart.series for point in series.points))


def _draw_lines(axes: Axes, chart: Chart) -> None:
    looks = cycle(zip(_PALETTE, _MARKERS, strict=True))
    colour, marker = next(looks)
    is_first = True
    for series in chart.series:
        if not (series.is_secondary or is_first):
            colour, marker = next(looks)
        is_first = False
        look: dict[str, Any] = (
            {"linestyle": ":", "linewidth": 1.2} if series.is_secondary else {"marker": marker, "markersize": 4}
        )
        points = series.points
        if len(points) == 1:
            look |= {"marker": marker, "markersize": 4}  # a single point makes no line
        if points:
            axes.plot([p.at for p in points], [p.value for p in points], color=colour, label=series.name, **look)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _draw_dots(axes: Axes, chart: Chart) -> None:
    names = _names(chart)
    shown = [series for series in chart.series if series.points]
    step = 0.7 / max(1, len(shown))
    looks = cycle(zip(_PALETTE, _MARKERS, strict=True))
    for i, (series, (colour, marker)) in enumerate(zip(shown, looks, strict=False)):
        below = (i - (len(shown) - 1) / 2) * step
        at = [names.index(point.at) + below for point in series.points]
        values = [point.value for point in series.points]
        axes.errorbar(
            values,
            at,
            xerr=_error_bars(series.points),
            fmt=marker,
            markersize=4.5,
            color=colour,
            capsize=2,
            elinewidth=1,
            label=series.name,
        )
    axes.set_yticks(range(len(names)), [_wrap(str(name)) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first name on top
    if chart.is_share:
        axes.set_xlim(-0.02, 1.02)


def _error_bars(points: list[Point]) -> list[list[float]] | None:
    """Return two lists: how far error bars reach below and above each point. None if no point has an interval."""
    bounds = [(point.low, point.high) for point in points]
    if all(low is None for low, _ in bounds):
        return None
    below = [0 if low is None else max(0.0, p.value - low) for p, (low, _) in zip(points, bounds, strict=True)]
    above = [0 if high is None else max(0.0, high - p.value) for p, (_, high) in zip(points, bounds, strict=True)]
    return [below, above]


def _draw_tradeoff(axes: Axes, chart: Chart) -> None:
    looks = cycle(zip(_PALETTE, _MARKERS, strict=True))
    for i, (series, (colour, marker)) in enumerate(zip(chart.series, looks, strict=False), 1):
        (point,) = series.points
        axes.plot(
            point.at,
            point.value,
            marker,
            markersize=8,
            markeredgecolor=colour,
            markerfacecolor=colour if series.name in chart.best else _PAPER,
            label=f"{i}  {series.name}",
        )
    places = {series.name: series.points[0] for series in chart.series}
    for pair in chart.joined:
        first, second = (places[name] for name in pair)
        axes.plot([first.at, second.at], [first.value, second.value], color=_INK, linewidth=0.8, zorder=1)
    for (x, y), numbers in _number_places([series.points[0] for series in chart.series]):
        axes.annotate(", ".join(numbers), (x, y), xytext=(7, 5), textcoords="offset points")
    axes.margins(0.12)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))


def _number_places(points: list[Point]) -> list[tuple[_Place, list[str]]]:
    """Number the points, and return the places of the numbers. Overlapping points share one place for their numbers."""
    extents = [max(values) - min(values) for values in zip(*((float(p.at), p.value) for p in points), strict=True)]
    found: list[tuple[_Place, list[str]]] = []
    for number, point in enumerate(points, 1):
        at = (float(point.at), point.value)
        for place, numbers in found:
            if all(abs(a - b) <= _SAME_PLACE * extent for a, b, extent in zip(at, place, extents, strict=True)):
                numbers.append(str(number))
                break
        else:
            found.append((at, [str(number)]))
    return found


_KINDS = {"lines": _draw_lines, "dots": _draw_dots, "tradeoff": _draw_tradeoff}


def _wrap(name: str) -> str:
    """Wrap a long name after commas, slashes and spaces. A part that is too long for a line is broken anywhere."""
    lines = [""]
    for part in re.findall(rf"[^,/ ]{{1,{_LONGEST_NAME}}}[,/ ]?|[,/ ]", name):
        if lines[-1] and len(lines[-1] + part) > _LONGEST_NAME:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
