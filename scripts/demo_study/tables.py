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


def changes_table(results: Results) -> str:
    """Show by how much SFT changed the experts, and how much of it nearest rounding kept.

    Cases with the same SFT and the same rounding have one row.
    """
    cases: dict[str, Case] = {}
    for case in present(results):
        cases.setdefault(json.dumps([each["models"][_NEAREST] for each in results.seeds(case.name).values()]), case)
    rows = []
    for case in cases.values():
        change, kept = (results.mean(case.name, _NEAREST, figure) for figure in ("change", "kept"))
        assert change is not None and kept is not None, case.name
        rows.append([case.title, change.show(2, 100.0), kept.show(1, 100.0)])
    return _table(["case", "relative change of the experts, %", "kept by rounding to nearest, %"], rows)


def time_table(results: Results) -> str:
    """Show the share of each stage in the time of a run: medians over the seeds."""
    rows = []
    for case in present(results):
        runs = list(results.seeds(case.name).values())
        shares = [[run["seconds"][stage] / sum(run["seconds"].values()) for run in runs] for stage in _STAGES]
        rows.append([case.title, *(f"{100 * statistics.median(each):.0f}" for each in shares)])
    return _table(["case", *(f"{stage}, %" for stage in _STAGES)], rows)


def run_text(results: Results) -> str:
    """Say which seeds ran, where, with which versions, and what the reports advise."""
    seeds = [f"- {case.title}: seeds {', '.join(results.seeds(case.name))}" for case in present(results)]
    advice = [f"- {case.title}: {_outcomes(results, case)}" for case in present(results)]
    return "\n".join(
        [
            *("The runs:", "", *seeds, ""),
            *("Headlines of their reports, with the numbers of seeds:", "", *advice, ""),
            _environment(results),
        ]
    )


def _environment(results: Results) -> str:
    found = results.record["environment"]
    libraries = ", ".join(f"{name} {value}" for name, value in found.items() if name not in ("processor", "threads"))
    return f"Each run used {found['threads']} thread of {found['processor']}; {libraries}."


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
    "changes": changes_table,
    "time": time_table,
    "tests": tests_table,
    **{f"models {case.name}": _of_case(models_table, case.name) for case in CASES},
    **{f"differences {case.name}": _of_case(differences_table, case.name) for case in CASES},
}
"""Name in docs/story.md -> function that makes the table."""
