"""Make the plots of the report as data. `plots` draws the data, and `page` also shows the data as tables."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.compare.digits import size
from pipeline.compare.names import EXPORT, MODELS, QAT, SFT, UPCAST, figure_title
from pipeline.compare.rows import Row, list_undominated
from pipeline.compare.runs import EvaluatedRun, distinct_runs
from pipeline.compare.table import is_rate
from pipeline.runs.metrics import read_metrics

QUALITY, ROUNDING, TRAINING = "Quality", "What rounding did", "Training"
GROUPS = (QUALITY, ROUNDING, TRAINING)
"""Groups of plots, in the order of the page."""

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
        group: one of GROUPS.
        best: in a trade-off, names of the points that no other point dominates.
        joined: in a trade-off, pairs of points of one model, which a line joins.
        is_share: whether values are shares from 0 to 1. The plot shows shares in percent.
    """

    name: str
    title: str
    description: str
    kind: str
    x: str
    y: str
    series: list[Series]
    group: str = QUALITY
    best: list[str] = field(default_factory=list)
    joined: list[tuple[str, str]] = field(default_factory=list)
    is_share: bool = False


def make_charts(runs: list[EvaluatedRun], rows: list[Row]) -> list[Chart]:
    """Make all plots that have points, in the order of the page."""
    found = [
        _tradeoff_chart(rows),
        *_rate_charts(rows),
        *_group_charts(rows),
        *_loss_charts(runs),
        *_change_charts(runs),
        *_layer_charts(runs),
    ]
    return [chart for chart in found if any(series.points for series in chart.series)]


# --- quality against size ---------------------------------------------------------------------------------------------

_SERVED = "served_bytes"


def _tradeoff_chart(rows: list[Row]) -> Chart:
    """Plot the validation loss against the size. An export and its twin of equal size are one point."""
    measured = [row for row in rows if all(math.isfinite(row.figures.get(name, math.nan)) for name in (_LOSS, _SERVED))]
    names = _point_names(measured)
    kept = [row for row in measured if row.title in names]
    best = [names[row.title] for row in list_undominated(kept, _SERVED, _LOSS, is_higher_better=False)]
    drawn = [row for row in kept if not _is_outlier(row, kept)]
    notes = [
        "Lower and further left is better.",
        *_dominance_notes([names[row.title] for row in kept], best),
        *(f"Outside the plot: {names[row.title]}, {row.figures[_LOSS]:.3f}." for row in kept if row not in drawn),
    ]
    series = [Series(names[row.title], [Point(row.figures[_SERVED], row.figures[_LOSS])]) for row in drawn]
    return Chart(
        name="tradeoff",
        title="Validation loss against size",
        description=" ".join(notes),
        kind="tradeoff",
        group=QUALITY,
        x="weights in memory when served",
        y="validation loss (nats)",
        series=series if len(series) > 1 else [],
        best=best,
        joined=[(names[row.title], names[other.title]) for row in drawn for other in _twins_of(row, drawn)],
    )


def _point_names(rows: list[Row]) -> dict[str, str]:
    """Return the names of the points, by the titles of their rows.

    An export and its twin share a point if they are equally large when served. The point has the figures of the export.
    """
    names = {row.title: row.title for row in rows}
    for export in [row for row in rows if row.twin is not None]:
        for row in _twins_of(export, rows):
            if f"{row.figures[_SERVED]:.2e}" == f"{export.figures[_SERVED]:.2e}":
                names.pop(row.title, None)
                names[export.title] = f"{row.title} = {export.title}"
    return names


def _twins_of(export: Row, rows: list[Row]) -> list[Row]:
    """Return the rows that are the twin of an export. An export with the twin's bytes has the twin's fingerprint."""
    return [row for row in rows if row is not export and row.fingerprint == export.twin]


def _dominance_notes(names: list[str], best: list[str]) -> Iterator[str]:
    yield "No other model dominates the filled points."
    dominated = ", ".join(name for name in names if name not in best)
    if dominated:
        yield (
            f"Dominated: {dominated}. For each of these, another model is smaller or better. That other model is"
            " neither larger nor worse."
        )


def _is_outlier(row: Row, rows: list[Row]) -> bool:
    """Return whether to leave a model out of the plot.

    The loss of the untrained original can be very high. The other models would then look like one point.
    """
    others = [each.figures[_LOSS] for each in rows if each.model != UPCAST]
    if row.model != UPCAST or len(others) < 2:
        return False
    return row.figures[_LOSS] > max(others) + 2 * (max(others) - min(others))


def _rate_names(rows: list[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row.figures if "/" not in name)
    return [name for name in names if is_rate(name, rows)]


def _slug(text: str) -> str:
    """Turn a text into a name for files and for ids in a page."""
    return re.sub("[^a-z0-9]+", "-", text.lower())


# --- figures of models ------------------------------------------------------------------------------------------------


def _rate_charts(rows: list[Row]) -> Iterator[Chart]:
    for name in _rate_names(rows):
        points = [_make_point(row, name, row.title) for row in rows if name in row.figures]
        yield Chart(
            name=_slug(f"rate-{name}"),
            title=figure_title(name),
            description="Share of decided answers that passed, with its 95 % interval.",
            kind="dots",
            x="passed (%)",
            y="",
            series=[Series(figure_title(name), points)],
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
        if len({point.at for each in series for point in each.points}) < 2:
            continue  # the values of the only group are in the table
        has_intervals = any(point.low is not None for each in series for point in each.points)
        yield Chart(
            name=_slug(f"groups-{figure}"),
            title=f"{figure_title(figure)} by group",
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
            for run, prefix in distinct_runs(runs, stage)
            for key, name in (("eval_loss", "validation"), ("loss", "training"))
        ]
        yield Chart(
            name=f"loss-{stage}",
            title=f"Losses of {stage.upper()}",
            description="The validation loss is measured over supervised tokens at each evaluation. The training loss"
            " is logged on the training examples.",
            kind="lines",
            group=TRAINING,
            x="optimizer step",
            y="loss (nats)",
            series=series,
        )


def _change_charts(runs: list[EvaluatedRun]) -> Iterator[Chart]:
    for key, title in (
        ("eval_changed_codes", "4-bit codes flipped since the start"),
        ("eval_moved_weights", "Weights moved since the start"),
    ):
        series = [
            Series(f"{prefix}{MODELS[stage]}", _points_by_step(run, stage, key))
            for stage in (SFT, QAT)
            for run, prefix in distinct_runs(runs, stage)
        ]
        yield Chart(
            name=_slug(f"training-{key.removeprefix('eval_')}"),
            title=title,
            description="Share of the experts' weights that differ from the start of the stage. Only the first expert"
            " of each layer is measured.",
            kind="lines",
            group=TRAINING,
            x="optimizer step",
            y="share (%)",
            series=series,
            is_share=True,
        )


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
        description="Share of weights whose 4-bit code changed, among the weights that training moved.",
    ),
)


def _layer_charts(runs: list[EvaluatedRun]) -> Iterator[Chart]:
    drawn: list[list[list[Point]]] = []
    for figure in _LAYER_FIGURES:
        series = [
            Series(f"{prefix}{MODELS[EXPORT]}", _points_by_layer(run, figure.key))
            for run, prefix in distinct_runs(runs, EXPORT)
        ]
        points = [each.points for each in series]
        if points in drawn:
            continue  # if training moved every weight, survival equals the share of flipped codes
        drawn.append(points)
        yield Chart(
            name=_slug(f"layers-{figure.key}"),
            title=figure.title,
            description=figure.description,
            kind="lines",
            group=ROUNDING,
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
