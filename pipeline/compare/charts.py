"""What the report plots, as data: drawn by `plots`, and shown as tables of the same figures by `page`."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.compare.findings import size
from pipeline.compare.rows import EXPORT, QAT, SFT, UPCAST, Row, undominated
from pipeline.compare.runs import Run
from pipeline.compare.table import is_rate
from pipeline.runs.metrics import read_metrics

_LOSS = "validation_loss"
_GROUPED = {_LOSS: "nats", "kl_divergence": "nats"}
"""Figures besides pass rates that are plotted by group (language, category, position), and their units."""


@dataclass(frozen=True)
class Point:
    """A value, with the bounds of its interval where it has one."""

    at: float | str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one kind; `is_secondary` ones are drawn thinner, in the colour of the series before."""

    name: str
    points: list[Point]
    is_secondary: bool = False


@dataclass(frozen=True)
class Chart:
    """One plot.

    Attributes:
        name: of its file and in the page: letters, digits, '-'.
        title: what is seen.
        description: how to read it, also for whom it is read aloud.
        kind: "lines" over numbers, "dots" beside names, or "tradeoff".
        x, y: of the axes, with units.
        series: what is drawn.
        best: of a trade-off, the points that no other dominates: their names.
        is_share: whether values are shares from 0 to 1, shown in percent.
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


def charts(runs: list[Run], rows: list[Row]) -> list[Chart]:
    """All plots that there is something for, in the order of the page."""
    found = [*_tradeoffs(rows), *_rates(rows), *_groups(rows), *_training(runs), *_layers(runs)]
    return [chart for chart in found if any(series.points for series in chart.series)]


# --- over sizes -------------------------------------------------------------------------------------------------------


def _tradeoffs(rows: list[Row]) -> Iterator[Chart]:
    for figure, what in (("served_bytes", "in memory when served"), ("weight_bytes", "on disk")):
        yield _tradeoff(rows, figure, what, _LOSS, "validation loss (nats)", -1)
    for rate in _rate_names(rows):
        yield _tradeoff(rows, "served_bytes", "in memory when served", rate, f"{_title(rate)} (%)", 1)


def _tradeoff(rows: list[Row], figure: str, what: str, quality: str, label: str, sign: int) -> Chart:
    measured = [
        row for row in rows if all(math.isfinite(row.figures.get(name, math.nan)) for name in (figure, quality))
    ]
    best = [row.title for row in undominated(measured, figure, quality, sign)]
    beaten = [row.title for row in measured if row.title not in best]
    drawn = [row for row in measured if not _is_far_off(row, measured, quality)]
    told = [
        f"{'Lower' if sign < 0 else 'Higher'} and further left is better; a filled point is dominated by no other.",
        *([f"Dominated, as another is as small and as good, or better: {', '.join(beaten)}."] if beaten else []),
        *(f"Far outside: {row.title}, {row.figures[quality]:.4f}." for row in measured if row not in drawn),
    ]
    return Chart(
        _slug(f"tradeoff-{figure}-{quality}"),
        f"{_title(quality)} against size {what}",
        " ".join(told),
        "tradeoff",
        f"weights {what}",
        label,
        [Series(row.title, [Point(row.figures[figure], row.figures[quality])]) for row in drawn] if drawn[1:] else [],
        best,
        is_share=sign > 0,
    )


def _is_far_off(row: Row, rows: list[Row], quality: str) -> bool:
    """Whether the original's loss would leave the others one point: it does, before anything is learnt."""
    others = [each.figures[quality] for each in rows if each.model != UPCAST]
    if row.model != UPCAST or quality != _LOSS or len(others) < 2:
        return False
    return row.figures[quality] > max(others) + 2 * (max(others) - min(others))


def _rate_names(rows: list[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row.figures if "/" not in name)
    return [name for name in names if is_rate(name, rows)]


def _slug(text: str) -> str:
    """A name for files and pages."""
    return re.sub("[^a-z0-9]+", "-", text.lower())


def _title(figure: str) -> str:
    return figure.replace("_", " ").capitalize()


# --- of models --------------------------------------------------------------------------------------------------------


def _rates(rows: list[Row]) -> Iterator[Chart]:
    for name in _rate_names(rows):
        points = [_point(row, name, row.title) for row in rows if name in row.figures]
        description = "Share of decided answers that passed, with its 95 % interval."
        yield Chart(
            _slug(f"rate-{name}"),
            _title(name),
            description,
            "dots",
            "passed (%)",
            "",
            [Series(_title(name), points)],
            is_share=True,
        )


def _groups(rows: list[Row]) -> Iterator[Chart]:
    """Figures of groups, such as languages: for each figure the groups, in each of them the models."""
    rates = _rate_names(rows)
    figures = dict.fromkeys(name.partition("/")[0] for row in rows for name in row.figures if "/" in name)
    for figure in [name for name in figures if name in rates or name in _GROUPED]:
        series = [
            Series(row.title, [_point(row, figure, name.partition("/")[2]) for name in _groups_of(row, figure)])
            for row in rows
        ]
        has_intervals = any(point.low is not None for each in series for point in each.points)
        yield Chart(
            _slug(f"groups-{figure}"),
            f"{_title(figure)} by group",
            "For each group one point of each model" + (", with its 95 % interval." if has_intervals else "."),
            "dots",
            _GROUPED.get(figure, "passed (%)"),
            "",
            series,
            is_share=figure in rates,
        )


def _groups_of(row: Row, figure: str) -> list[str]:
    """Names of the figures of groups; checks within a pass rate have no counts of their own, and are none."""
    names = [name for name in row.figures if name.startswith(f"{figure}/")]
    return [name for name in names if figure in _GROUPED or f"{figure}_decided/{name.partition('/')[2]}" in row.figures]


def _point(row: Row, figure: str, at: str) -> Point:
    group = f"/{at}" if f"{figure}/{at}" in row.figures else ""
    bounds = (row.figures.get(f"{figure}{part}{group}") for part in ("_low", "_high"))
    return Point(at, row.figures[f"{figure}{group}"], *bounds)


# --- of training ------------------------------------------------------------------------------------------------------


def _training(runs: list[Run]) -> Iterator[Chart]:
    for stage in (SFT, QAT):
        series = [
            Series(f"{prefix}{name}", _over_steps(run, stage, key), is_secondary=key == "loss")
            for run, prefix in _distinct(runs, stage)
            for key, name in (("eval_loss", "validation"), ("loss", "training"))
        ]
        description = "Validation: over supervised tokens, at each evaluation; training: as logged, on other examples."
        title = f"Losses of {stage.upper()}"
        yield Chart(f"loss-{stage}", title, description, "lines", "optimizer step", "loss (nats)", series)
    for key, title in (("eval_changed_codes", "Flipped 4-bit codes"), ("eval_moved_weights", "Moved weights")):
        series = [
            Series(f"{prefix}{stage}", _over_steps(run, stage, key))
            for stage in (SFT, QAT)
            for run, prefix in _distinct(runs, stage)
        ]
        description = "Share of the experts' weights that differ from the start of the stage (first expert of a stack)."
        name = _slug(f"training-{key.removeprefix('eval_')}")
        yield Chart(name, title, description, "lines", "optimizer step", "share (%)", series, is_share=True)


def _distinct(runs: list[Run], stage: str) -> list[tuple[Run, str]]:
    """Runs whose stage is their own, and what its series begin with: one that runs share is drawn once."""
    found = {run.stage_dir(stage): run for run in reversed(runs) if run.stage_dir(stage) is not None}
    return [(run, f"{run.label}: " if len(found) > 1 else "") for run in runs if found.get(run.stage_dir(stage)) is run]


def _over_steps(run: Run, stage: str, key: str) -> list[Point]:
    directory = run.stage_dir(stage)
    lines = [] if directory is None else read_metrics(directory)
    by_step = {line["step"]: line[key] for line in lines if "step" in line and key in line}
    return [Point(step, by_step[step]) for step in sorted(by_step)]


# --- of exports -------------------------------------------------------------------------------------------------------

_OF_LAYERS = (
    ("snr_db", "Rounding error by layer", "signal-to-noise (dB)", False, "Of the experts' weights; higher is better."),
    ("changed_codes", "Flipped codes by layer", "share (%)", True, "4-bit values that differ from the base model's."),
    (
        "survival",
        "Survival by layer",
        "share (%)",
        True,
        "Of the weights that training moved, those whose code changed.",
    ),
)


def _layers(runs: list[Run]) -> Iterator[Chart]:
    for key, title, unit, is_share, description in _OF_LAYERS:
        series = [Series(f"{prefix}{EXPORT}", _by_layer(run, key)) for run, prefix in _distinct(runs, EXPORT)]
        name = _slug(f"layers-{key}")
        yield Chart(name, title, description, "lines", "layer", unit, series, is_share=is_share)


def _by_layer(run: Run, key: str) -> list[Point]:
    directory = run.stage_dir(EXPORT)
    lines = [] if directory is None else read_metrics(directory)
    return [Point(line["layer"], line[key]) for line in lines if "layer" in line and line.get(key) is not None]


# --- as tables --------------------------------------------------------------------------------------------------------


def figures(chart: Chart) -> tuple[list[str], list[list[str]]]:
    """The chart's figures, for whom a plot says nothing: titles of the columns, and lines of them."""
    has_interval = any(point.low is not None for series in chart.series for point in series.points)
    head = [
        "",
        chart.x if chart.kind != "dots" else "",
        chart.y or chart.x,
        *(["95 % interval"] if has_interval else []),
    ]
    lines = [
        [
            series.name,
            _at(chart, point),
            _value(chart, point.value),
            *([_interval(chart, point)] if has_interval else []),
        ]
        for series in chart.series
        for point in series.points
    ]
    return head, lines


def _at(chart: Chart, point: Point) -> str:
    if isinstance(point.at, str):
        return point.at
    return size(point.at) if chart.kind == "tradeoff" else f"{point.at:g}"


def _value(chart: Chart, value: float) -> str:
    return f"{100 * value:.2f}" if chart.is_share else f"{value:.4f}"


def _interval(chart: Chart, point: Point) -> str:
    if point.low is None or point.high is None:
        return "–"
    return f"{_value(chart, point.low)} to {_value(chart, point.high)}"
