"""Draws the plots of docs/rounding.md as SVG. The same results give the same bytes with the same matplotlib."""

import hashlib
import json
from io import StringIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.rounding_study.cells import DROP, LARGE
from scripts.rounding_study.figures import Results
from scripts.rounding_study.settings import FULL, LORA, SIZES
from scripts.rounding_study.statistics import Estimate
from scripts.rounding_study.tables import describe_rounding, list_runs, ways

_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito (2008)
_MARKERS = ("o", "s", "^", "D")
_STYLE = {"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}


def draw(results: Results) -> dict[str, str]:
    """Return the name and the text of each SVG file."""
    return {
        "rounding_divergence.svg": _save(results, "divergence", _draw_divergences(results)),
        "rounding_gap.svg": _save(results, "gap", _draw_gaps(results)),
    }


def digest(results: Results) -> str:
    """Return a digest of the results. Each plot holds the digest of the results that it shows."""
    return hashlib.sha256(json.dumps(results.record["seeds"], sort_keys=True).encode()).hexdigest()[:16]


def _save(results: Results, name: str, figure: Figure) -> str:
    text = StringIO()
    metadata = {**dict.fromkeys(("Date", "Creator", "Format", "Type")), "Description": digest(results)}
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", facecolor="white", metadata=metadata)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _draw_divergences(results: Results) -> Figure:
    """Draw KL(SFT || rounded) of the full fine-tune, for each way of rounding and size of change."""
    names = [DROP, *ways("mxfp4")]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for i, size in enumerate(SIZES):
            found = [results.mean(f"ptq/ceil/{FULL}/{size}/mxfp4/{name}", "kl") for name in names]
            _draw_points(axes, found, 0.2 * (i - 1), i, f"experts changed by {size}")
        axes.set_xscale("log")
        axes.set_xlabel("KL(SFT ‖ rounded), nats per token")
        _finish(figure, axes, [describe_rounding(name) for name in names])
    return figure


def _draw_gaps(results: Results) -> Figure:
    """Draw the share of the gap that each run closes, against more SFT at the same rate."""
    variants = [(method, size) for method in (FULL, LORA) for size in LARGE]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        axes = figure.add_subplot()
        names: list[str] = []
        for i, (method, size) in enumerate(variants):
            runs = [run for run in list_runs(results, method, size) if run.is_in_plot]
            names = [f"{run.name}, {run.fraction}" for run in runs]
            found = [results.closed(run.cell, f"more/{method}/{size}/{run.fraction}") for run in runs]
            _draw_points(axes, found, 0.18 * (i - 1.5), i, f"{'LoRA' if method == LORA else 'full'}, {size}")
        for share in (0, 0.75, 1):
            axes.axvline(share, color="#777777", linewidth=0.8, linestyle=":")
        axes.set_xlim(-1.6, 2.1)
        axes.set_xlabel("share of the gap that is closed (dotted: 0, 75 % and 100 %)")
        _finish(figure, axes, names)
    return figure


def _draw_points(axes: Axes, found: list[Estimate], below: float, series: int, label: str | None) -> None:
    at = [i + below for i in range(len(found))]
    means = [each.mean for each in found]
    below_mean = [0.0 if each.low is None else each.mean - each.low for each in found]
    above_mean = [0.0 if each.high is None else each.high - each.mean for each in found]
    look = {"fmt": _MARKERS[series], "color": _PALETTE[series], "markersize": 4, "capsize": 2, "elinewidth": 1}
    axes.errorbar(means, at, xerr=[below_mean, above_mean], label=label, **look)


def _finish(figure: Figure, axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [name.replace("`", "") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.4)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
