"""The runs of the study. Each is one ordinary command of the program, so a killed run goes on where it stopped."""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import RoundingMethod, Stage
from pipeline.runs.artifacts import ARTIFACT_FILE
from scripts.recording import name_processor

SEEDED = ("data.seed", "sft.seed", "qat.seed", "quantize.seed")
"""Settings that get the seed of a run. All runs have the same base model, validation rows and test prompts."""

_LORA = ("train@sft=lora", "train@qat=lora", "sft.learning_rate=1e-3")
_NVFP4 = ("format=nvfp4", "export.target=nvfp4")
_FIGURES = ("validation_loss", "kl_divergence", "served_bytes")
_ACCOUNT = {"change": "relative_change", "kept": "kept", "changed_scales": "changed_scales"}
_LIBRARIES = ("torch", "transformers", "trl", "peft", "nvidia-modelopt")
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

    `cpu_seconds` is the CPU time of the whole command. A run that was interrupted lacks it.

    Raises:
        RuntimeError: the command failed. Its output is in a file beside the run.
        ValueError: different programs or environments made the stages of the run.
    """
    run_dir = directory / case.name / f"seed{seed}"
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    log = run_dir.with_suffix(".log")
    is_new = not run_dir.exists()
    started, cpu_before = time.monotonic(), _children_cpu_seconds()
    given = ["stage=all", *arguments(case, seed, run_dir, extra)]
    with log.open("a", encoding="utf-8") as output:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *given], stdout=output, stderr=output, env=_environment()
        )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(given)}: status {done.returncode}. The output is in {log}.")
    cpu_seconds = round(_children_cpu_seconds() - cpu_before)
    print(f"{case.name}, seed {seed}: {time.monotonic() - started:.0f} s, {cpu_seconds} CPU seconds", flush=True)
    return read_figures(run_dir, case) | ({"cpu_seconds": cpu_seconds} if is_new else {})


def read_figures(run_dir: Path, case: Case) -> dict[str, Any]:
    """Read the figures of a complete run: of its models, its paired tests and its stages.

    Models that were only rounded are named `rounded/<method>`, whether the run or a control made them.

    Returns:
        outcome: headline of the report.
        models: model -> its figures. A rate also has the values of its groups, named `<rate>/<group>`. `rounding` is
            the method and the scales that rounded its experts. `change` and `kept` are the account of this rounding.
            QAT's model has the rounding of its export.
        tests: the paired tests.
        prompts: rate -> number of prompts that it is computed from, in total and for each group.
        validation_rows: number of rows that the loss and the KL divergence are computed from.
        seconds: stage -> seconds. Controls are one sum.
        environment: commit of the program, processor, threads, and versions.

    Raises:
        ValueError: different programs or environments made the stages of the run.
    """
    report = json.loads((run_dir / "compare" / "compare.json").read_text(encoding="utf-8"))
    names = {row["model"]: _name(row) for row in report["rows"]}
    return {
        "outcome": report["verdicts"][0]["outcome"],
        "models": {names[row["model"]]: _read_row(row, case) for row in report["rows"]},
        "tests": _read_tests(report["tests"], names, case),
        "prompts": _read_prompts(report["rows"], case),
        "validation_rows": _read_artifact(run_dir / Stage.sft.name)["details"]["validation_rows"],
        "seconds": _read_seconds(run_dir),
        "environment": _read_environment(run_dir),
    }


def _read_tests(tests: list[dict[str, Any]], names: dict[str, str], case: Case) -> list[dict[str, Any]]:
    return [
        {
            "figure": test["figure"],
            "model": names[test["model"]],
            "reference": names[test["reference"]],
            "p": _shorten(test["p_value_corrected"]),
            "better": test["wins"],
            "worse": test["losses"],
        }
        for test in tests
        if test["figure"] in case.rates
    ]


def _name(row: dict[str, Any]) -> str:
    model: str = row["model"]
    origin, _, stage = model.rpartition("/")
    if stage != Stage.quantize.name or origin not in ("", *(f"controls/{method.name}" for method in RoundingMethod)):
        return model
    return f"rounded/{row['rounding']['method'].partition(',')[0]}"


def _read_row(row: dict[str, Any], case: Case) -> dict[str, Any]:
    names = [*(name for name in (*_FIGURES, *case.rates) if name in row), *_groups(row, case.rates)]
    found = {name: _shorten(row[name]) for name in names}
    if not row.get("rounding"):
        return found
    account = row["rounding"]["account"]
    found |= {short: _shorten(account[name]) for short, name in _ACCOUNT.items() if account.get(name) is not None}
    return {**found, "rounding": row["rounding"]["method"]}


def _groups(row: dict[str, Any], rates: tuple[str, ...]) -> list[str]:
    """Return the names of the rates' values for groups: `<rate>/<group>`."""
    return [name for rate in rates for name in row if name.startswith(f"{rate}/")]


def _read_prompts(rows: list[dict[str, Any]], case: Case) -> dict[str, int]:
    """Return the numbers of prompts, with those whose answer by the SFT model has no verdict."""
    (sft,) = (row for row in rows if row["model"] == Stage.sft.name)
    rates = (*case.rates, *_groups(sft, case.rates))
    parts = {name: name.partition("/") for name in rates}
    return {
        name: round(sft[f"{rate}_decided{slash}{group}"] / (1 - sft[f"{rate}_undecided{slash}{group}"]))
        for name, (rate, slash, group) in parts.items()
    }


def _read_seconds(run_dir: Path) -> dict[str, float]:
    """Return the seconds of each stage of the run, without its controls. Those of all controls are one sum."""
    seconds: dict[str, float] = {"controls": 0.0}
    for path in _own_stages(run_dir):
        name = path.relative_to(run_dir).parts[0]
        seconds[name] = seconds.get(name, 0.0) + _read_artifact(path)["seconds"]
    return {stage: round(value, 1) for stage, value in seconds.items()}


def _read_environment(run_dir: Path) -> dict[str, Any]:
    """Return the commit, the machine and the versions that all stages of a run have in common."""
    found = {json.dumps(_environment_of(_read_artifact(path)), sort_keys=True) for path in _own_stages(run_dir)}
    if len(found) > 1:
        raise ValueError(
            f"{run_dir}: different environments made its stages: {'; '.join(sorted(found))}. Delete this directory, and"
            " run again."
        )
    made: dict[str, Any] = json.loads(found.pop())
    return {"processor": name_processor(), **made}


def _environment_of(artifact: dict[str, Any]) -> dict[str, Any]:
    names = {"commit": "git_commit", "device": "device", "python": "python"}
    versions = {name: artifact["libraries"][name] for name in _LIBRARIES}
    return {**{short: artifact[name] for short, name in names.items()}, **versions}


def _own_stages(run_dir: Path) -> list[Path]:
    """Return the directories of the stages that a run and its controls made. A control has links to other stages."""
    found = (path.parent for path in sorted(run_dir.rglob(ARTIFACT_FILE)) if not path.is_symlink())
    return [path for path in found if not path.is_symlink()]


def _read_artifact(stage: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stage / ARTIFACT_FILE).read_text(encoding="utf-8"))
    return found


def _children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _shorten(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.{_DIGITS}g}")


def _environment() -> dict[str, str]:
    """Return the environment of a run. Runs use one thread, so that several of them can share a machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
