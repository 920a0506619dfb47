"""Writes the tables of docs/full_shape.md from the results. The text around them is written by hand."""

import json
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.runs.host_memory import training_bytes
from scripts.full_shape.plan import BASE, RUNS, RunPlan
from scripts.written_tables import markdown_table, replace_tables

PAGE = Path(__file__).resolve().parents[2] / "docs" / "full_shape.md"
_GIB, _GB = 2**30, 10**9

Record = dict[str, Any]
"""Content of the results file."""


def text(results: Path, page: Path = PAGE) -> str:
    """Return the text of the page with the tables of the results.

    Raises:
        ValueError: the page lacks a part, or names a part that does not exist.
    """
    record = json.loads(results.read_text(encoding="utf-8"))
    return replace_tables(
        page, "scripts/demo_full_shape", {name: partial(make, record) for name, make in PARTS.items()}
    )


def write(results: Path, page: Path = PAGE) -> None:
    """Write the tables into the page."""
    page.write_text(text(results, page), encoding="utf-8")


def _environment(record: Record) -> str:
    machine = record["environment"]
    libraries = ", ".join(f"{name} {each}" for name, each in machine["libraries"].items())
    commits = sorted({step["commit"][:12] for step in _complete(record).values() if step.get("commit")})
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / _GIB:.1f} GiB of memory,"
        f" {machine['system']}, {machine['device']}.\nPython {machine['python']}, {libraries}.\n"
        f"Commits of the program: {', '.join(commits)}.\n"
    )


def _steps(record: Record) -> str:
    head = ("run", "stage", "seconds", "CPU-seconds", "peak memory, GiB", "result")
    rows = []
    for name, step in _complete(record).items():
        run, stage = name.split("/")
        figures = (f"{step['seconds']:.0f}", f"{step['cpu_seconds']:.0f}", f"{step['peak_bytes'] / _GIB:.2f}")
        result = _RESULTS[stage](step["result"]) + (f"; {step['attempts']} attempts" if step["attempts"] > 1 else "")
        rows.append(
            (
                "" if run == BASE else f"`{run}`",
                "make the checkpoint" if run == BASE else f"`{stage}`",
                *figures,
                result,
            )
        )
    missing = [name for name in _expected() if name not in _complete(record)]
    note = textwrap.fill(f"Not complete: {', '.join(f'`{name}`' for name in missing)}.", 120)
    return markdown_table(head, rows) + (f"\n{note}\n" if missing else "")


def _commands(record: Record) -> str:
    return "\n".join(_first_command(record, run) for run in RUNS)


def _first_command(record: Record, run: RunPlan) -> str:
    """Show the command of a run's first stage that has begun."""
    begun = (f"{run.name}/{stage}" for stage in run.stages if f"{run.name}/{stage}" in record["steps"])
    name = next(begun, None)
    if name is None:
        return f"`{run.name}` has not begun.\n"
    words = record["steps"][name]["command"].split()
    lines = " \\\n  ".join([" ".join(words[:4]), *words[4:]])
    return f"`{run.name}`:\n\n```bash {{.needs-time}}\n{lines}\n```\n"


def _predictions(record: Record) -> str:
    rows = []
    for run in RUNS:
        predicted = _complete(record).get(f"{run.name}/doctor", {}).get("result", {}).get("predicted_bytes", {})
        for stage, size in predicted.items():
            measured = _complete(record).get(f"{run.name}/{stage}")
            if measured is not None:
                peak, whole = measured["peak_bytes"], training_bytes(size)
                figures = (f"{whole / _GIB:.2f}", f"{peak / _GIB:.2f}", f"{whole / peak:.2f}")
                rows.append((f"`{run.name}`", f"`{stage}`", *figures))
    return markdown_table(("run", "stage", "predicted, GiB", "measured, GiB", "ratio"), rows)


PARTS: dict[str, Callable[[Record], str]] = {
    "environment": _environment,
    "stages": _steps,
    "predictions": _predictions,
    "commands": _commands,
}
"""Name of each written part of the page -> function that makes it."""


def _doctor(found: Record) -> str:
    sizes = ", ".join(f"{stage} {size / _GB:.1f} GB" for stage, size in found["predicted_bytes"].items())
    return f"predicts {sizes}" if found["fits"] else f"predicts {sizes}: does not fit"


def _upcast(found: Record) -> str:
    what = "decoded" if found["decoded_tensors"] else "linked"
    return f"{what}, {found['tensor_bytes'] / _GB:.1f} GB"


def _training(found: Record) -> str:
    losses = f"validation loss {found['validation_loss_before']:.3f}, then {found['validation_loss']:.3f}"
    return f"{found['steps']} steps, {losses}"


def _quantize(found: Record) -> str:
    return f"{found['method']}, {found['quantizers']} quantizers"


def _export(found: Record) -> str:
    return (
        f"{found['tensor_bytes'] / _GB:.1f} GB, {found['copied_tensors']} tensors are the source's own bytes,"
        f" {found['encoded_tensors']} encoded"
    )


def _verify(found: Record) -> str:
    others = [f"{count} {status}" for status, count in found.items() if status not in ("ok", "not_checked")]
    return ", ".join([f"{found['ok']} checks ok", *others])


_RESULTS: dict[str, Callable[[Record], str]] = {
    "make": lambda found: f"{found['file_bytes'] / _GB:.1f} GB",
    "doctor": _doctor,
    "upcast": _upcast,
    "sft": _training,
    "quantize": _quantize,
    "qat": _training,
    "export": _export,
    "verify": _verify,
}


def _complete(record: Record) -> dict[str, Any]:
    """Return the complete steps, in the order of the demonstration."""
    return {name: record["steps"][name] for name in _expected() if record["steps"].get(name, {}).get("status") == 0}


def _expected() -> list[str]:
    return [f"{BASE}/make", *(f"{run.name}/{stage}" for run in RUNS for stage in run.stages)]
