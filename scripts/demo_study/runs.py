"""The runs of the study. Each is one ordinary command of the program, so a killed run goes on where it stopped."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import RoundingMethod, Stage
from pipeline.runs.artifacts import ARTIFACT_FILE

SEEDED = ("data.seed", "sft.seed", "qat.seed", "quantize.seed")
"""Settings that get the seed of a run. All runs have the same base model, validation rows and test prompts."""

_LORA = ("train@sft=lora", "train@qat=lora", "sft.learning_rate=1e-3")
_NVFP4 = ("format=nvfp4", "export.target=nvfp4")
_FIGURES = ("validation_loss", "kl_divergence", "served_bytes")
_ACCOUNT = {"change": "relative_change", "kept": "kept"}
_DIGITS = 6


@dataclass(frozen=True)
class Case:
    """A recipe with some settings.

    Attributes:
        name: name in the results file.
        title: description for readers.
        recipe: name of the recipe.
        overrides: settings that differ from the recipe's.
        rates: figures of the recipe's scorers that the study shows.
    """

    name: str
    title: str
    recipe: str
    overrides: tuple[str, ...]
    rates: tuple[str, ...]


_LANGUAGE = ("reasoning_language", "exact_match")
_REFUSAL = ("safe_answered", "unsafe_refused")
CASES = (
    Case("mxfp4_full", "MXFP4, every weight", "demo", (), _LANGUAGE),
    Case(
        "mxfp4_nearest",
        "MXFP4, every weight, QAT from nearest rounding",
        "demo",
        ("quantize.method=nearest",),
        _LANGUAGE,
    ),
    Case("mxfp4_lora", "MXFP4, LoRA", "demo", _LORA, _LANGUAGE),
    Case("nvfp4_full", "NVFP4, every weight", "demo", _NVFP4, _LANGUAGE),
    Case("nvfp4_lora", "NVFP4, LoRA", "demo", (*_NVFP4, *_LORA), _LANGUAGE),
    Case("refusal_mxfp4_full", "refusals, MXFP4, every weight", "demo_refusal", (), _REFUSAL),
)


def arguments(case: Case, seed: int, run_dir: Path, extra: tuple[str, ...] = ()) -> list[str]:
    """Return the arguments of a run's command."""
    seeds = [f"{key}={seed}" for key in SEEDED]
    return [
        f"recipe={case.recipe}",
        f"run_dir={run_dir}",
        "evaluate.prompts.max_samples=null",
        *case.overrides,
        *seeds,
        *extra,
    ]


def run(case: Case, seed: int, directory: Path, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run all stages of a case with a seed, and return its figures.

    Raises:
        RuntimeError: the command failed. Its output is in a file beside the run.
    """
    run_dir = directory / case.name / f"seed{seed}"
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    log = run_dir.with_suffix(".log")
    started = time.monotonic()
    given = ["stage=all", *arguments(case, seed, run_dir, extra)]
    with log.open("a", encoding="utf-8") as output:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *given], stdout=output, stderr=output, env=_environment()
        )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(given)}: status {done.returncode}. The output is in {log}.")
    print(f"{case.name}, seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
    return read_figures(run_dir, case)


def read_figures(run_dir: Path, case: Case) -> dict[str, Any]:
    """Read the figures of a complete run: of its models, its paired tests and its stages.

    Models that were only rounded are named `rounded/<method>`, whether the run or a control made them.
    """
    report = json.loads((run_dir / "compare" / "compare.json").read_text(encoding="utf-8"))
    names = {row["model"]: _name(row) for row in report["rows"]}
    return {
        "outcome": report["verdicts"][0]["outcome"],
        "models": {names[row["model"]]: _read_row(row, case) for row in report["rows"]},
        "tests": [
            {
                "figure": test["figure"],
                "model": names[test["model"]],
                "reference": names[test["reference"]],
                "p": _shorten(test["p_value_corrected"]),
                "better": test["wins"],
                "worse": test["losses"],
            }
            for test in report["tests"]
            if test["figure"] in case.rates
        ],
        "seconds": _read_seconds(run_dir),
    }


def _name(row: dict[str, Any]) -> str:
    model: str = row["model"]
    origin, _, stage = model.rpartition("/")
    if stage != Stage.quantize.name or origin not in ("", *(f"controls/{method.name}" for method in RoundingMethod)):
        return model
    return f"rounded/{row['rounding']['method'].partition(',')[0]}"


def _read_row(row: dict[str, Any], case: Case) -> dict[str, float]:
    found = {name: row[name] for name in (*_FIGURES, *case.rates) if name in row}
    account = row["rounding"]["account"] if row.get("rounding") else {}
    found |= {short: account[name] for short, name in _ACCOUNT.items() if account.get(name) is not None}
    return {name: _shorten(value) for name, value in found.items()}


def _read_seconds(run_dir: Path) -> dict[str, float]:
    """Return the seconds of each stage of the run, without its controls. Those of all controls are one sum."""
    seconds: dict[str, float] = {"controls": 0.0}
    for path in sorted(run_dir.rglob(ARTIFACT_FILE)):
        where = path.parent.relative_to(run_dir).parts
        spent = json.loads(path.read_text(encoding="utf-8"))["seconds"]
        if where[0] == "controls":
            seconds["controls"] += spent
        elif not path.parent.is_symlink() and not path.is_symlink():
            seconds[where[0]] = seconds.get(where[0], 0.0) + spent
    return {stage: round(value, 1) for stage, value in seconds.items()}


def _shorten(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.{_DIGITS}g}")


def _environment() -> dict[str, str]:
    """Return the environment of a run. Runs use one thread, so that several of them can share a machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
