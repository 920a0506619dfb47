"""Charts drawn: as PNG, and as SVG that takes the page's colours. The only importer of matplotlib.

The same figures give the same bytes: nothing in a file tells when, where or by what it was drawn. Series differ in
marker and line, not in colour alone; the colours are Okabe and Ito's (2008), told apart by the colour-blind.
"""

import re
from collections import Counter
from html import escape
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.compare.charts import Chart, Point
from pipeline.compare.findings import size

_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_INK, _FAINT, _PAPER = "#1a1a1b", "#d0d0d1", "#fffffe"
_ROLES = {_INK: "currentColor", _FAINT: "var(--faint)", _PAPER: "var(--paper)"}
_ROLES |= {colour: f"var(--series-{i})" for i, colour in enumerate(_PALETTE, 1)}
"""What is drawn on white, and what the page's style sheet calls it."""

_WIDTH_INCHES, _HEIGHT_INCHES = 6.4, 3.4
_LINE_INCHES = 0.17  # of one point beside a name
_PNG_DPI = 150
_LONGEST_NAME = 30
_LEGEND_LETTERS = 90  # of a line
_SAME_PLACE = 0.03  # of an axis
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a name may hold dollar signs
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


def png(chart: Chart, path: Path) -> None:
    """Draw a chart on white into a file."""
    with matplotlib.rc_context(_STYLE):
        _drawn(chart).savefig(path, format="png", dpi=_PNG_DPI, facecolor="white", metadata={"Software": None})


def svg(chart: Chart) -> str:
    """Draw a chart as an <svg> element for a page that defines --faint, --paper and --series-1 to --series-7."""
    text = StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": chart.name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        _drawn(chart).savefig(text, format="svg", transparent=True, metadata=nothing)
    element = text.getvalue()[text.getvalue().index("<svg") :]
    for colour, role in _ROLES.items():
        element = element.replace(colour, role)
    # Ids must be the chart's own: a page holds several.
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{chart.name}-", element)
    label = f"<title>{escape(chart.title)}</title><desc>{escape(chart.description)}</desc>"
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img">{_plain(label)}', element, count=1)


def _plain(text: str) -> str:
    """Text that `re.sub` puts in as it stands."""
    return text.replace("\\", "\\\\")


def _drawn(chart: Chart) -> Figure:
    shown = [series for series in chart.series if series.points]
    longest = max(len(series.name) for series in shown)
    columns = max(1, min(4, len(shown), _LEGEND_LETTERS // (longest + 5)))
    height = _HEIGHT_INCHES if chart.kind != "dots" else 0.9 + _LINE_INCHES * max(8, _lines_of(chart))
    figure = Figure(figsize=(_WIDTH_INCHES, height + _LINE_INCHES * (len(shown) // columns)), layout="constrained")
    axes = figure.add_subplot()
    _KINDS[chart.kind](axes, chart)
    _label(axes, chart)
    if len(shown) > 1:
        figure.legend(loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def _label(axes: Any, chart: Chart) -> None:
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    if chart.is_share:
        axis = axes.xaxis if chart.kind == "dots" else axes.yaxis
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.grid(axis="x" if chart.kind == "dots" else "y", linewidth=0.6)
    axes.set_axisbelow(True)


def _lines_of(chart: Chart) -> int:
    """Points that lie below one another and room between names, or what long names take."""
    points = Counter(point.at for series in chart.series for point in series.points)
    return sum(max(count + 1, 1 + _wrapped(str(name)).count("\n")) for name, count in points.items())


def _names(chart: Chart) -> list[Any]:
    return list(dict.fromkeys(point.at for series in chart.series for point in series.points))


def _draw_lines(axes: Any, chart: Chart) -> None:
    looks = cycle(zip(_PALETTE, _MARKERS, strict=True))
    colour, marker = next(looks)
    is_first = True
    for series in chart.series:
        if not (series.is_secondary or is_first):
            colour, marker = next(looks)
        is_first = False
        look = {"linestyle": ":", "linewidth": 1.2} if series.is_secondary else {"marker": marker, "markersize": 4}
        points = series.points
        if points:
            axes.plot([p.at for p in points], [p.value for p in points], color=colour, label=series.name, **look)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _draw_dots(axes: Any, chart: Chart) -> None:
    names = _names(chart)
    shown = [series for series in chart.series if series.points]
    step = 0.7 / max(1, len(shown))
    looks = cycle(zip(_PALETTE, _MARKERS, strict=True))
    for i, (series, (colour, marker)) in enumerate(zip(shown, looks, strict=False)):
        below = (i - (len(shown) - 1) / 2) * step
        at = [names.index(point.at) + below for point in series.points]
        values = [point.value for point in series.points]
        look = {"fmt": marker, "markersize": 4.5, "color": colour, "capsize": 2, "elinewidth": 1}
        axes.errorbar(values, at, xerr=_bars(series.points), label=series.name, **look)
    axes.set_yticks(range(len(names)), [_wrapped(str(name)) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first name on top
    if chart.is_share:
        axes.set_xlim(-0.02, 1.02)


def _bars(points: list[Point]) -> Any:
    """(2, n) lengths of the intervals, none for points without."""
    bounds = [(point.low, point.high) for point in points]
    if all(low is None for low, _ in bounds):
        return None
    below = [0 if low is None else max(0.0, p.value - low) for p, (low, _) in zip(points, bounds, strict=True)]
    above = [0 if high is None else max(0.0, high - p.value) for p, (_, high) in zip(points, bounds, strict=True)]
    return [below, above]


def _draw_tradeoff(axes: Any, chart: Chart) -> None:
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
    for (x, y), numbers in _places([series.points[0] for series in chart.series]):
        axes.annotate(", ".join(numbers), (x, y), xytext=(7, 5), textcoords="offset points")
    axes.margins(0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))


def _places(points: list[Point]) -> list[tuple[tuple[Any, float], list[str]]]:
    """Where points lie, and their numbers: one place for those that would be drawn over one another."""
    extents = [max(values) - min(values) for values in zip(*((p.at, p.value) for p in points), strict=True)]
    found: list[tuple[tuple[Any, float], list[str]]] = []
    for number, point in enumerate(points, 1):
        at = (point.at, point.value)
        for place, numbers in found:
            if all(abs(a - b) <= _SAME_PLACE * extent for a, b, extent in zip(at, place, extents, strict=True)):
                numbers.append(str(number))
                break
        else:
            found.append((at, [str(number)]))
    return found


_KINDS = {"lines": _draw_lines, "dots": _draw_dots, "tradeoff": _draw_tradeoff}


def _wrapped(name: str) -> str:
    """A long name on several lines, broken after commas and slashes, or where there are none, anywhere."""
    lines = [""]
    for part in re.findall(rf"[^,/]{{1,{_LONGEST_NAME}}}[,/]?|[,/]", name):
        if lines[-1] and len(lines[-1] + part) > _LONGEST_NAME:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
