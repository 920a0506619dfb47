"""Draws the plot of docs/story.md as SVG. The same results give the same bytes with the same matplotlib."""

from io import StringIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.demo_study.results import Results
from scripts.demo_study.runs import CASES
from scripts.demo_study.tables import MODELS, present

_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # Okabe and Ito (2008)
_MARKERS = ("o", "s", "^", "D", "v")
_STYLE = {"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
_PANELS = (("kl_divergence", "KL to SFT, nats per token"), ("reasoning_language", "requested language, %"))


def draw(results: Results) -> str:
    """Return the SVG: the KL divergence and the language of each model, for each case of `recipe=demo`."""
    cases = [case for case in present(results) if case.recipe == "demo"]
    models = [model for model in MODELS if any(model in results.models(case.name) for case in cases)]
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "demo"}):
        figure = Figure(figsize=(8, 3.8), layout="constrained")
        for axes, (name, label) in zip(figure.subplots(1, 2, sharey=True), _PANELS, strict=True):
            for i, case in enumerate(cases):
                _draw_case(axes, results, case.name, models, name, i, len(cases))
            axes.set_xlabel(label)
        axes.set_yticks(range(len(models)), [MODELS[model] for model in models])
        axes.invert_yaxis()
        figure.axes[0].set_xscale("log")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        text = StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", facecolor="white", metadata=metadata)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _draw_case(axes: Axes, results: Results, case: str, models: list[str], figure: str, row: int, rows: int) -> None:
    """Draw a case's estimates and intervals, each a little below those of the case before."""
    factor, least = (1.0, 1e-6) if figure == "kl_divergence" else (100.0, 0.0)
    places, means, below, above = [], [], [], []
    for i, model in enumerate(models):
        found = results.mean(case, model, figure) if model in results.models(case) else None
        if found is None:
            continue
        low, high = (found.mean if end is None else end for end in (found.low, found.high))
        places.append(i + 0.13 * (row - (rows - 1) / 2))
        means.append(factor * found.mean)
        below.append(means[-1] - max(factor * low, min(least, means[-1])))  # a logarithmic axis has no zero
        above.append(factor * high - means[-1])
    (title,) = (each.title for each in CASES if each.name == case)
    style = {"fmt": _MARKERS[row], "color": _PALETTE[row], "markersize": 4, "linewidth": 1}
    points, _, (intervals,) = axes.errorbar(means, places, xerr=[below, above], label=title, **style)
    points.set_gid(f"points-{case}-{figure}")
    intervals.set_gid(f"intervals-{case}-{figure}")
