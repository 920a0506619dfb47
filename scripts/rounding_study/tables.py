"""Makes the tables of docs/rounding.md from the results."""

import textwrap
from collections.abc import Callable
from typing import NamedTuple

from scripts.rounding_study.cells import DROP, LARGE, ROUNDINGS, STARTS
from scripts.rounding_study.figures import Results
from scripts.rounding_study.rounding import BASE, GPTQ, STOCHASTIC
from scripts.rounding_study.settings import BF16_PARTS, FULL, LORA, SIZES
from scripts.rounding_study.statistics import Estimate
from scripts.written_tables import markdown_table

_MILLI = 1000
_SCALES = {BASE: "the base's scales"}
_TRAINED = {FULL: "full", LORA: "LoRA", BF16_PARTS: "BF16 parts"}
_TARGET_RATIO, _TARGET_CLOSED = 0.2, 0.75
_DEFAULTS = {FULL: ("1/3",), LORA: ("1/10", "1/3")}
"""Method -> the rates of QAT, as fractions of SFT's, for which the target is stated."""


def describe_rounding(way: str) -> str:
    """Return the shown name of a way of rounding, as cells name it."""
    method, _, rule = way.partition(" ")
    return "drop the experts' change" if way == DROP else f"{method}, {_SCALES.get(rule, f'`{rule}`')}"


def ways(form: str) -> list[str]:
    """List the ways of rounding to a format, as cells name them."""
    return [f"{method} {rule}" for method, rule in ROUNDINGS[form]]


def _run(results: Results) -> str:
    record = results.record
    seconds = [seed["cpu_seconds"] for seed in record["seeds"].values()]
    settings, where = record["settings"], record["environment"]
    versions = ", ".join(f"{name} {each}" for name, each in where.items() if name != "processor")
    text = (
        f"Seeds: {', '.join(results.seeds)} ({len(results.seeds)} in all). The model has {record['parameters']:,}"
        f" parameters, {settings['layers']} layers, and {settings['experts']} experts per layer."
        f" Steps: {settings['pretraining_steps']} of pretraining, {settings['grid_steps']} with fake quantization,"
        f" {settings['sft_steps']} of SFT, {settings['extra_steps']} of QAT or of more SFT."
        f" A seed took {min(seconds)} to {max(seconds)} CPU-seconds on one core ({where['processor']}; {versions})."
    )
    return textwrap.fill(text, 120, break_on_hyphens=False) + "\n"


def _tuning(results: Results) -> str:
    rows = []
    for rule, method in (("ceil", FULL), ("ceil", LORA), ("floor", FULL)):
        for size in SIZES:
            name = f"sft/{rule}/{method}/{size}"
            rate = results.record["settings"]["rates"][method][size]
            change = results.mean(name, "relative_change").show(3, 100)
            row = [f"{_TRAINED[method]}, {size}", f"`{rule}`", f"{rate:g}", f"{change} %"]
            rows.append([*row, results.mean(name, "loss").show(4)])
    before, least = (results.mean("base/ceil", name).show(4) for name in ("loss", "entropy"))
    note = f"Loss of the base `ceil` on the fine-tuning data: {before}. No model can be below {least}.\n\n"
    return note + markdown_table(["fine-tune", "base", "peak rate", "change of the experts", "loss"], rows)


def _divergences(rule: str, method: str, form: str) -> Callable[[Results], str]:
    def make(results: Results) -> str:
        names = [*([DROP] if form == "mxfp4" else []), *ways(form)]
        cells = {way: [f"ptq/{rule}/{method}/{size}/{form}/{way}" for size in SIZES] for way in names}
        rows = [
            [describe_rounding(way), *(results.mean(cell, "kl").show(3, _MILLI) for cell in found)]
            for way, found in cells.items()
        ]
        return markdown_table(["rounding", *SIZES], rows)

    return make


def _account(results: Results) -> str:
    rows = []
    for way in ways("mxfp4"):
        row = [describe_rounding(way)]
        for size in SIZES:
            cell = f"ptq/ceil/{FULL}/{size}/mxfp4/{way}"
            row.append(f"{results.mean(cell, 'kept').mean:.2f} / {100 * results.mean(cell, 'noise').mean:.1f} %")
        rows.append(row)
    return markdown_table(["rounding", *(f"{size}: kept / noise" for size in SIZES)], rows)


def _gap(results: Results) -> str:
    rows = []
    for method in (FULL, LORA):
        for size in LARGE:
            more, variant = f"more/{method}/{size}/1", f"ceil/{method}/{size}"
            shown = [results.mean(f"sft/{variant}", "loss"), results.mean(f"{more}/none", "loss")]
            gap = results.difference(f"{more}/nearest", f"{more}/none")
            rows.append([f"{_TRAINED[method]}, {size}", *(each.show(4) for each in shown), gap.show(2, _MILLI)])
    return markdown_table(["fine-tune", "loss of SFT", "loss of more SFT", "gap: nearest minus unrounded, 10⁻³"], rows)


def _closing(method: str, size: str) -> Callable[[Results], str]:
    def make(results: Results) -> str:
        head = ["what follows SFT", "rate", "loss minus unrounded, 10⁻³", "KL to SFT, 10⁻³"]
        head += ["gap closed", "gap closed, same rate"]
        rows = []
        for cell, shown, fraction in list_runs(results, method, size):
            more, same = (f"more/{method}/{size}/{each}" for each in ("1", fraction))
            excess = results.difference(cell, f"{more}/none").show(2, _MILLI)
            divergence = results.mean(cell, "kl").show(2, _MILLI)
            shares = [f"{results.closed(cell, control).show(0, 100)} %" for control in (more, same)]
            rows.append([shown, fraction, excess, divergence, *shares])
        return markdown_table(head, rows)

    return make


class Run(NamedTuple):
    """A run that follows SFT.

    Attributes:
        cell: its cell.
        name: shown name.
        fraction: its rate as a fraction of SFT's.
    """

    cell: str
    name: str
    fraction: str

    @property
    def is_in_plot(self) -> bool:
        """Whether the plot shows it. The control that defines 0 %, and the BF16 parts, are left out."""
        return not self.cell.endswith("/1/nearest") and BF16_PARTS not in self.cell


def list_runs(results: Results, method: str, size: str) -> list[Run]:
    """List the runs that follow a fine-tune."""
    fractions = list(results.record["settings"]["fractions"])
    default = results.record["settings"]["default_fraction"]
    found = [Run(f"more/{method}/{size}/1/{start}", f"more SFT, then {start}", "1") for start in STARTS]
    start = f"qat/{method}/{size}/mxfp4"
    found += [Run(f"{start}/nearest/{each}", "QAT", each) for each in fractions]
    found += [Run(f"{start}/{each}/{default}", f"QAT from {each}", default) for each in (STOCHASTIC, GPTQ)]
    found.append(Run(f"{start}/nearest/{default}/distilled", "QAT with distillation", default))
    found.append(Run(f"qat/{method}/{size}/nvfp4/nearest/{default}", "QAT in NVFP4", default))
    if method == FULL and size == SIZES[0]:
        parts = f"qat/{BF16_PARTS}/{size}/mxfp4"
        found += [Run(f"{parts}/{each}/{default}", f"BF16 parts train on, from {each}", default) for each in STARTS]
    return found


def _parts(results: Results) -> str:
    rows = []
    largest = SIZES[0]
    pairs = [(f"bf16/{size}/1", f"sft/ceil/{FULL}/{size}", size, 1) for size in SIZES]
    pairs.append((f"bf16/{largest}/3", "fast/3", largest, 3))
    for parts, full, size, factor in pairs:
        rate = factor * results.record["settings"]["rates"][FULL][size]
        losses = [results.mean(name, "loss").show(4) for name in (parts, full)]
        rounded = f"ptq/ceil/{FULL}/{size}/mxfp4/nearest ceil"
        against = results.difference(parts, rounded).show(2, _MILLI) if factor == 1 else "not measured"
        gained = f"{results.gained(parts, full, 'base/ceil').show(0, 100)} %"
        rows.append([f"{rate:g}", *losses, results.difference(parts, full).show(2, _MILLI), against, gained])
    head = ["peak rate", "BF16 parts", "full SFT", "difference, 10⁻³", "difference from full SFT, nearest `ceil`, 10⁻³"]
    return markdown_table([*head, "share of full SFT's gain"], rows)


def _targets(results: Results) -> str:
    rows = []
    near = f"ptq/ceil/{FULL}/{SIZES[0]}/mxfp4/nearest ceil"
    for way in ("gptq ceil", "stochastic base"):
        ratio = results.ratio(f"ptq/ceil/{FULL}/{SIZES[0]}/mxfp4/{way}", near)
        is_met = _is_below(ratio, _TARGET_RATIO)
        rows.append([f"KL of {way.split()[0]} / KL of nearest `ceil`, 10 %", "≤ 0.2", ratio.show(3), is_met])
    for method, fractions in _DEFAULTS.items():
        for size in LARGE:
            for fraction in fractions:
                what = f"gap closed by QAT, {_TRAINED[method]}, {size}, {fraction} of SFT's rate"
                for control, note in (("1", ""), (fraction, "; more SFT at the same rate")):
                    share = results.closed(
                        f"qat/{method}/{size}/mxfp4/nearest/{fraction}", f"more/{method}/{size}/{control}"
                    )
                    shown = f"{share.show(0, 100)} %"
                    rows.append([what + note, "≥ 75 %", shown, _is_above(share, _TARGET_CLOSED)])
    parts = results.difference(f"bf16/{SIZES[0]}/1", f"sft/ceil/{FULL}/{SIZES[0]}")
    rows.append(["loss of BF16 parts − loss of full SFT, 10 %", "≤ 0", parts.show(4), _is_below(parts, 0.0)])
    return markdown_table(["quantity", "target", "measured", "met"], rows)


def _is_below(found: Estimate, limit: float) -> str:
    return _judge(found.mean <= limit, found.high is not None and found.high <= limit)


def _is_above(found: Estimate, limit: float) -> str:
    return _judge(found.mean >= limit, found.low is not None and found.low >= limit)


def _judge(is_met: bool, is_certain: bool) -> str:
    return "yes" if is_certain else ("mean only" if is_met else "**no**")


TABLES: dict[str, Callable[[Results], str]] = {
    "run": _run,
    "tuning": _tuning,
    "ceil full": _divergences("ceil", FULL, "mxfp4"),
    "ceil lora": _divergences("ceil", LORA, "mxfp4"),
    "floor full": _divergences("floor", FULL, "mxfp4"),
    "nvfp4": _divergences("ceil", FULL, "nvfp4"),
    "account": _account,
    "gap": _gap,
    **{f"closing {method} {size}": _closing(method, size) for method in (FULL, LORA) for size in LARGE},
    "parts": _parts,
    "targets": _targets,
}
"""Name of a table in the page -> function that makes it."""
