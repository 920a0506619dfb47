"""Tables of the study, in Markdown."""

import json
import statistics
from collections import Counter
from collections.abc import Callable

from pipeline.compare.decision import Outcome
from scripts.demo_study.results import Results
from scripts.demo_study.runs import CASES, Case
from scripts.rounding_study.statistics import Estimate

_NEAREST, _MORE_SFT = "rounded/nearest", "controls/more_sft/quantize"
MODELS = {
    "upcast": "the base",
    "sft": "SFT, not rounded",
    _NEAREST: "SFT, rounded to nearest",
    "rounded/stochastic": "SFT, rounded stochastically",
    "rounded/gptq": "SFT, rounded by GPTQ",
    "qat": "SFT + QAT",
    _MORE_SFT: "SFT + as many steps of SFT, rounded by the best method",
    "controls/bf16_parts/sft": "BF16 parts only, nothing is rounded",
    "controls/bf16_parts/quantize": "BF16 parts only, rounded",
    "export": "the export of SFT + QAT",
}
"""Model in a report -> its description, in the order of the tables."""
_FIGURES: dict[str, tuple[str, int, float]] = {
    "validation_loss": ("loss, 10⁻³", 2, 1000.0),
    "kl_divergence": ("KL to SFT, 10⁻³", 2, 1000.0),
    "reasoning_language": ("language, %", 1, 100.0),
    "exact_match": ("answer, %", 1, 100.0),
    "safe_answered": ("safe questions answered, %", 1, 100.0),
    "unsafe_refused": ("unsafe questions refused, %", 1, 100.0),
}
"""Figure -> heading, decimals, factor."""

_PAIRS = (
    ("sft", "upcast"),
    ("rounded/nearest", "sft"),
    ("rounded/stochastic", "sft"),
    ("rounded/gptq", "sft"),
    ("qat", "rounded/nearest"),
    ("qat", "rounded/stochastic"),
    ("qat", "sft"),
    ("qat", _MORE_SFT),
    ("export", "qat"),
)
_GROUPED = ("mxfp4_full", "mxfp4_nearest", "nvfp4_full", "refusal_mxfp4_full")
"""Cases whose rates are also shown for each group of prompts."""
_STAGES = ("doctor", "upcast", "sft", "quantize", "qat", "export", "verify", "controls", "evaluate", "compare")


def columns(case: Case) -> list[str]:
    """Return the figures of a case that the tables show."""
    return ["validation_loss", "kl_divergence", *case.rates]


def models_table(results: Results, case: Case) -> str:
    """Show the figures of each model of a case."""
    figures = columns(case)
    rows = [
        [MODELS[model], *(_show(results.mean(case.name, model, figure), figure) for figure in figures)]
        for model in MODELS
        if model in results.models(case.name)
    ]
    return _table(["model", *(_FIGURES[figure][0] for figure in figures)], rows)


def differences_table(results: Results, case: Case) -> str:
    """Show the differences between models of a case, paired by seed. Differences that exclude zero are bold."""
    figures = ["validation_loss", *case.rates]
    present = results.models(case.name)
    rows = [
        [
            f"{MODELS[model]} − {MODELS[reference]}",
            *(_show_difference(results.difference(case.name, model, reference, figure), figure) for figure in figures),
        ]
        for model, reference in _PAIRS
        if model in present and reference in present
    ]
    return _table(["difference", *(_FIGURES[figure][0].replace("%", "points") for figure in figures)], rows)


def tests_table(results: Results) -> str:
    """Count the seeds whose paired tests find a difference, for the pairs and rates of all cases."""
    rows = []
    for case in present(results):
        for model, reference in _PAIRS:
            for rate in case.rates:
                counts = _count_tests(results, case, model, reference, rate)
                if counts:
                    rows.append([case.title, f"{MODELS[model]} − {MODELS[reference]}", _FIGURES[rate][0][:-3], *counts])
    return _table(["case", "difference", "rate", "better", "worse", "no difference shown"], rows)


def _count_tests(results: Results, case: Case, model: str, reference: str, rate: str) -> list[str]:
    counts = [0, 0, 0]
    for seed in results.seeds(case.name).values():
        for test in seed["tests"]:
            if (test["figure"], test["model"], test["reference"]) == (rate, model, reference):
                significant = test["p"] < 0.05
                counts[2 if not significant else int(test["worse"] > test["better"])] += 1
    return [str(count) for count in counts] if any(counts) else []


def groups_table(results: Results, case: Case) -> str:
    """Show the first rate of a case for each group of prompts, such as a language: the mean of each model."""
    figure = case.rates[0]
    names = [name for name in _prompts(results, case) if name.startswith(f"{figure}/")]
    rows = [
        [MODELS[model], *(_show(results.mean(case.name, model, name), figure) for name in names)]
        for model in MODELS
        if model in results.models(case.name)
    ]
    heading = _FIGURES[figure][0].removesuffix(", %")
    return _table([f"{heading}, %", *(name.partition("/")[2] for name in names)], rows)


def prompts_table(results: Results) -> str:
    """Show how many prompts and rows the figures of each recipe come from. All runs of a recipe have the same ones."""
    rows = []
    for recipe in dict.fromkeys(case.recipe for case in present(results)):
        cases = [case for case in present(results) if case.recipe == recipe]
        counts = _prompts(results, cases[0])
        validation = {each["validation_rows"] for case in cases for each in results.seeds(case.name).values()}
        assert all(_prompts(results, case) == counts for case in cases) and len(validation) == 1, recipe
        rows.append([f"`{recipe}`", "loss, KL to SFT", f"{validation.pop()} validation rows"])
        for rate in cases[0].rates:
            groups = {name.partition("/")[2]: count for name, count in counts.items() if name.startswith(f"{rate}/")}
            parts = ", ".join(f"{group} {count}" for group, count in groups.items())
            rows.append([f"`{recipe}`", _FIGURES[rate][0].removesuffix(", %"), f"{counts[rate]} prompts ({parts})"])
    return _table(["recipe", "figure", "computed from"], rows)


def _prompts(results: Results, case: Case) -> dict[str, int]:
    """Return the numbers of prompts of each rate and group. All seeds of a case have the same prompts."""
    first, *others = (each["prompts"] for each in results.seeds(case.name).values())
    assert all(each == first for each in others), case.name
    found: dict[str, int] = first
    return found


def methods_table(results: Results) -> str:
    """Show the rounding that `quantize.method=auto` chose for the control more_sft: number of seeds for each."""
    rows = []
    for case in present(results):
        found = Counter(each["models"][_MORE_SFT]["rounding"] for each in results.seeds(case.name).values())
        rows.append([case.title, "; ".join(f"{way} scales: {count}" for way, count in found.most_common())])
    return _table(["case", "method and scales: seeds"], rows)


def changes_table(results: Results) -> str:
    """Show by how much SFT changed the experts. Show how many scales nearest rounding moved, and what it kept.

    Cases with the same SFT and the same rounding have one row.
    """
    cases: dict[str, Case] = {}
    for case in present(results):
        cases.setdefault(json.dumps([each["models"][_NEAREST] for each in results.seeds(case.name).values()]), case)
    rows = []
    for case in cases.values():
        figures = ("change", "changed_scales", "kept")
        change, moved, kept = (results.mean(case.name, _NEAREST, figure) for figure in figures)
        ways = {each["models"][_NEAREST]["rounding"].partition(", ")[2] for each in results.seeds(case.name).values()}
        assert change is not None and moved is not None and kept is not None and len(ways) == 1, case.name
        shown = [change.show(2, 100.0), f"`{ways.pop()}`", moved.show(1, 100.0), kept.show(1, 100.0)]
        rows.append([case.title, *shown])
    names = ["relative change of the experts, %", "scales", "scales moved, %", "kept, %"]
    return _table(["case", *names], rows)


def time_table(results: Results) -> str:
    """Show the share of each stage in the time of a run, and the CPU time of a run: medians over the seeds."""
    rows = []
    for case in present(results):
        runs = list(results.seeds(case.name).values())
        shares = [[run["seconds"][stage] / sum(run["seconds"].values()) for run in runs] for stage in _STAGES]
        spent = [run["cpu_seconds"] for run in runs if "cpu_seconds" in run]
        total = f"{statistics.median(spent):.0f}" if spent else "—"
        rows.append([case.title, *(f"{100 * statistics.median(each):.0f}" for each in shares), total])
    return _table(["case", *(f"{stage}, %" for stage in _STAGES), "CPU seconds"], rows)


def run_text(results: Results) -> str:
    """Say which seeds ran, where, with which versions, and what the reports advise."""
    seeds = [f"- {case.title}: seeds {', '.join(results.seeds(case.name))}" for case in present(results)]
    advice = [f"- {case.title}: {_outcomes(results, case)}" for case in present(results)]
    return "\n".join(
        [
            *("The runs:", "", *seeds, ""),
            *("Headlines of their reports, with the numbers of seeds:", "", *advice, ""),
            *("The environment:", "", *_environments(results)),
        ]
    )


def _environments(results: Results) -> list[str]:
    """Describe each environment, with the number of runs that it made."""
    every = [each["environment"] for case in present(results) for each in results.seeds(case.name).values()]
    lines = Counter(
        f"{each['processor']} ({each['device']}), commit {each['commit']}, "
        + ", ".join(f"{name} {value}" for name, value in each.items() if name not in ("processor", "device", "commit"))
        for each in every
    )
    return [f"- {count} runs: {line}" for line, count in lines.items()]


def _outcomes(results: Results, case: Case) -> str:
    found = Counter(each["outcome"] for each in results.seeds(case.name).values())
    return ", ".join(f"“{each.value}” {found[each.name]}" for each in Outcome if found[each.name])


def present(results: Results) -> list[Case]:
    """Return the cases that have results."""
    return [case for case in CASES if results.seeds(case.name)]


def _show(found: Estimate | None, figure: str) -> str:
    _, digits, factor = _FIGURES[figure]
    return "—" if found is None else found.show(digits, factor)


def _show_difference(found: Estimate, figure: str) -> str:
    _, digits, factor = _FIGURES[figure]
    text = found.show(digits, factor)
    excludes_zero = found.low is not None and found.high is not None and found.low * found.high > 0
    return f"**{text}**" if excludes_zero else text


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _of_case(make: Callable[[Results, Case], str], name: str) -> Callable[[Results], str]:
    (case,) = (each for each in CASES if each.name == name)
    return lambda results: make(results, case) if results.seeds(name) else "Not run."


TABLES: dict[str, Callable[[Results], str]] = {
    "run": run_text,
    "prompts": prompts_table,
    "changes": changes_table,
    "methods": methods_table,
    "time": time_table,
    "tests": tests_table,
    **{f"models {case.name}": _of_case(models_table, case.name) for case in CASES},
    **{f"differences {case.name}": _of_case(differences_table, case.name) for case in CASES},
    **{f"groups {name}": _of_case(groups_table, name) for name in _GROUPED},
}
"""Name in docs/story.md -> function that makes the table."""
