"""Make the plots of the report as data. `plots` draws the data, and `page` also shows the data as tables."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.compare.findings import size
from pipeline.compare.rows import EXPORT, QAT, SFT, UPCAST, Row, undominated
from pipeline.compare.runs import EvaluatedRun
from pipeline.compare.table import is_rate
from pipeline.runs.metrics import read_metrics

_LOSS = "validation_loss"
_GROUPED = {_LOSS: "nats", "kl_divergence": "nats"}
"""Figures that are plotted by group (language, category, position) -> their units. Pass rates are added to them."""


@dataclass(frozen=True)
class Point:
    """A point of a plot: its place on one axis, its value on the other axis, and the value's interval, if any."""

    at: float | str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points under one name. A secondary series is drawn thinner, in the colour of the series before it."""

    name: str
    points: list[Point]
    is_secondary: bool = False


@dataclass(frozen=True)
class Chart:
    """One plot.

    Attributes:
        name: name of the plot's file. It is also the id of the plot in the page. It has only letters, digits and '-'.
        title: heading of the plot.
        description: instructions for reading the plot. Screen readers read them aloud.
        kind: "lines", "dots" or "tradeoff". With "lines", x is a number, such as the step. With "dots", each row has
            a name, such as German.
        x, y: labels of the axes, with units.
        series: the points, by series.
        best: in a trade-off, names of the points that no other point dominates.
        is_share: whether values are shares from 0 to 1. The plot shows shares in percent.
    """

    name: str
    title: str
    description: str
    kind: str
    x: str
    y: str
    series: list[Series]
    best: list[str] = field(default_factory=list)
    is_share: bool = False


def make_charts(runs: list[EvaluatedRun], rows: list[Row]) -> list[Chart]:
    """Make all plots that have points, in the order of the page."""
    found = [
        *_tradeoff_charts(rows),
        *_rate_charts(rows),
        *_group_charts(rows),
        *_loss_charts(runs),
        *_change_charts(runs),
        *_layer_charts(runs),
    ]
    return [chart for chart in found if any(series.points for series in chart.series)]


# --- quality against size ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """An axis of a trade-off plot.

    Attributes:
        figure: name of the figure in Row.figures.
        words: the figure's name in the title of the plot.
        label: label of the axis.
    """

    figure: str
    words: str
    label: str


_SERVED = _Axis("served_bytes", "in memory when served", "weights in memory when served")
_ON_DISK = _Axis("weight_bytes", "on disk", "weights on disk")


def _tradeoff_charts(rows: list[Row]) -> Iterator[Chart]:
    loss = _Axis(_LOSS, _title(_LOSS), "validation loss (nats)")
    for size_axis in (_SERVED, _ON_DISK):
        yield _tradeoff_chart(rows, size_axis, loss, is_higher_better=False)
    for name in _rate_names(rows):
        rate = _Axis(name, _title(name), f"{_title(name)} (%)")
        yield _tradeoff_chart(rows, _SERVED, rate, is_higher_better=True)


def _tradeoff_chart(rows: list[Row], size_axis: _Axis, quality: _Axis, *, is_higher_better: bool) -> Chart:
    figures = (size_axis.figure, quality.figure)
    measured = [row for row in rows if all(math.isfinite(row.figures.get(name, math.nan)) for name in figures)]
    best = [row.title for row in undominated(measured, *figures, is_higher_better=is_higher_better)]
    drawn = [row for row in measured if not _is_outlier(row, measured, quality.figure)]
    notes = [
        f"{'Higher' if is_higher_better else 'Lower'} and further left is better.",
        *_dominance_notes(measured, best),
        *(f"Outside the plot: {row.title}, {row.figures[quality.figure]:.4f}." for row in measured if row not in drawn),
    ]
    points = [(row.title, Point(row.figures[size_axis.figure], row.figures[quality.figure])) for row in drawn]
    return Chart(
        name=_slug(f"tradeoff-{size_axis.figure}-{quality.figure}"),
        title=f"{quality.words} against size {size_axis.words}",
        description=" ".join(notes),
        kind="tradeoff",
        x=size_axis.label,
        y=quality.label,
        series=[Series(title, [point]) for title, point in points] if len(points) > 1 else [],
        best=best,
        is_share=is_higher_better,
    )


def _dominance_notes(rows: list[Row], best: list[str]) -> Iterator[str]:
    yield "No other model dominates the filled points."
    dominated = ", ".join(row.title for row in rows if row.title not in best)
    if dominated:
        yield (
            f"Dominated: {dominated}. For each of these, another model is smaller or better. That other model is"
            " neither larger nor worse."
        )


def _is_outlier(row: Row, rows: list[Row], quality: str) -> bool:
    """Return whether to leave a model out of the plot.

    The loss of the untrained original can be very high. The other models would then look like one point.
    """
    others = [each.figures[quality] for each in rows if each.model != UPCAST]
    if row.model != UPCAST or quality != _LOSS or len(others) < 2:
        return False
    return row.figures[quality] > max(others) + 2 * (max(others) - min(others))


def _rate_names(rows: list[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row.figures if "/" not in name)
    return [name for name in names if is_rate(name, rows)]


def _slug(text: str) -> str:
    """Turn a text into a name for files and for ids in a page."""
    return re.sub("[^a-z0-9]+", "-", text.lower())


def _title(figure: str) -> str:
    return figure.replace("_", " ").capitalize()


# --- figures of models ------------------------------------------------------------------------------------------------


def _rate_charts(rows: list[Row]) -> Iterator[Chart]:
    for name in _rate_names(rows):
        points = [_make_point(row, name, row.title) for row in rows if name in row.figures]
        yield Chart(
            name=_slug(f"rate-{name}"),
            title=_title(name),
            description="Share of decided answers that passed, with its 95 % interval.",
            kind="dots",
            x="passed (%)",
            y="",
            series=[Series(_title(name), points)],
            is_share=True,
        )


def _group_charts(rows: list[Row]) -> Iterator[Chart]:
    """Plot each figure that has values for groups, such as languages. Each group has a point for every model."""
    rates = _rate_names(rows)
    figures = dict.fromkeys(name.partition("/")[0] for row in rows for name in row.figures if "/" in name)
    for figure in [name for name in figures if name in rates or name in _GROUPED]:
        series = [
            Series(
                row.title, [_make_point(row, figure, name.partition("/")[2]) for name in _group_figures(row, figure)]
            )
            for row in rows
        ]
        has_intervals = any(point.low is not None for each in series for point in each.points)
        yield Chart(
            name=_slug(f"groups-{figure}"),
            title=f"{_title(figure)} by group",
            description="One point for each group and model" + (", with its 95 % interval." if has_intervals else "."),
            kind="dots",
            x=_GROUPED.get(figure, "passed (%)"),
            y="",
            series=series,
            is_share=figure in rates,
        )


def _group_figures(row: Row, figure: str) -> list[str]:
    """Return the names of a figure's values for groups. Each name has the form `<figure>/<group>`.

    The parts of a pass rate, such as the checks of `format_health`, have similar names but are not groups. The parts
    are recognized because they have no count of decided answers.
    """
    names = [name for name in row.figures if name.startswith(f"{figure}/")]
    return [name for name in names if figure in _GROUPED or f"{figure}_decided/{name.partition('/')[2]}" in row.figures]


def _make_point(row: Row, figure: str, at: str) -> Point:
    group = f"/{at}" if f"{figure}/{at}" in row.figures else ""
    bounds = (row.figures.get(f"{figure}{part}{group}") for part in ("_low", "_high"))
    return Point(at, row.figures[f"{figure}{group}"], *bounds)


# --- training ---------------------------------------------------------------------------------------------------------


def _loss_charts(runs: list[EvaluatedRun]) -> Iterator[Chart]:
    for stage in (SFT, QAT):
        series = [
            Series(f"{prefix}{name}", _points_by_step(run, stage, key), is_secondary=key == "loss")
            for run, prefix in _distinct_runs(runs, stage)
            for key, name in (("eval_loss", "validation"), ("loss", "training"))
        ]
        yield Chart(
            name=f"loss-{stage}",
            title=f"Losses of {stage.upper()}",
            description="The validation loss is measured over supervised tokens at each evaluation. The training loss"
            " is logged on the training examples.",
            kind="lines",
            x="optimizer step",
            y="loss (nats)",
            series=series,
        )


def _change_charts(runs: list[EvaluatedRun]) -> Iterator[Chart]:
    for key, title in (("eval_changed_codes", "Flipped 4-bit codes"), ("eval_moved_weights", "Moved weights")):
        series = [
            Series(f"{prefix}{stage}", _points_by_step(run, stage, key))
            for stage in (SFT, QAT)
            for run, prefix in _distinct_runs(runs, stage)
        ]
        yield Chart(
            name=_slug(f"training-{key.removeprefix('eval_')}"),
            title=title,
            description="Share of the experts' weights that differ from the start of the stage. Only the first expert"
            " of each layer is measured.",
            kind="lines",
            x="optimizer step",
            y="share (%)",
            series=series,
            is_share=True,
        )


def _distinct_runs(runs: list[EvaluatedRun], stage: str) -> list[tuple[EvaluatedRun, str]]:
    """Return the runs to draw for this stage. Each run comes with a prefix for the names of its series.

    Several runs may share the directory of a stage. Such a stage is drawn once, for the first of these runs.
    """
    found = {run.stage_dir(stage): run for run in reversed(runs) if run.stage_dir(stage) is not None}
    return [(run, f"{run.label}: " if len(found) > 1 else "") for run in runs if found.get(run.stage_dir(stage)) is run]


def _points_by_step(run: EvaluatedRun, stage: str, key: str) -> list[Point]:
    directory = run.stage_dir(stage)
    lines = [] if directory is None else read_metrics(directory)
    by_step = {line["step"]: line[key] for line in lines if "step" in line and key in line}
    return [Point(step, by_step[step]) for step in sorted(by_step)]


# --- exports ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LayerFigure:
    """A figure that `export` logs for each layer."""

    key: str
    title: str
    unit: str
    is_share: bool
    description: str


_LAYER_FIGURES = (
    _LayerFigure(
        "snr_db",
        "Rounding error by layer",
        "signal-to-noise ratio (dB)",
        is_share=False,
        description="Signal-to-noise ratio of the experts' rounded weights. Higher is better.",
    ),
    _LayerFigure(
        "changed_codes",
        "Flipped codes by layer",
        "share (%)",
        is_share=True,
        description="Share of 4-bit codes that differ from the base model's.",
    ),
    _LayerFigure(
        "survival",
        "Survival by layer",
        "share (%)",
        is_share=True,
        description="Among the weights that training moved, the share whose 4-bit code changed.",
    ),
)


def _layer_charts(runs: list[EvaluatedRun]) -> Iterator[Chart]:
    for figure in _LAYER_FIGURES:
        series = [
            Series(f"{prefix}{EXPORT}", _points_by_layer(run, figure.key))
            for run, prefix in _distinct_runs(runs, EXPORT)
        ]
        yield Chart(
            name=_slug(f"layers-{figure.key}"),
            title=figure.title,
            description=figure.description,
            kind="lines",
            x="layer",
            y=figure.unit,
            series=series,
            is_share=figure.is_share,
        )


def _points_by_layer(run: EvaluatedRun, key: str) -> list[Point]:
    directory = run.stage_dir(EXPORT)
    lines = [] if directory is None else read_metrics(directory)
    return [Point(line["layer"], line[key]) for line in lines if "layer" in line and line.get(key) is not None]


# --- tables -----------------------------------------------------------------------------------------------------------


def tabulate(chart: Chart) -> tuple[list[str], list[list[str]]]:
    """Return the figures of a plot as a table: the titles of the columns, and the lines of cells."""
    has_interval = any(point.low is not None for series in chart.series for point in series.points)
    head = ["", chart.x if chart.kind != "dots" else "", chart.y or chart.x]
    lines = [
        [
            series.name,
            _format_at(chart, point),
            _format_value(chart, point.value),
            *([_format_interval(chart, point)] if has_interval else []),
        ]
        for series in chart.series
        for point in series.points
    ]
    return [*head, "95 % interval"] if has_interval else head, lines


def _format_at(chart: Chart, point: Point) -> str:
    if isinstance(point.at, str):
        return point.at
    return size(point.at) if chart.kind == "tradeoff" else f"{point.at:g}"


def _format_value(chart: Chart, value: float) -> str:
    return f"{100 * value:.2f}" if chart.is_share else f"{value:.4f}"


def _format_interval(chart: Chart, point: Point) -> str:
    if point.low is None or point.high is None:
        return "–"
    return f"{_format_value(chart, point.low)} to {_format_value(chart, point.high)}"
