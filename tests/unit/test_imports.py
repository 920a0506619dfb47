"""Imports point one way, and each big library has one importer. Read from the sources; nothing is imported."""

import ast
import sys
from functools import cache
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "pipeline"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("stages", "command_line"),
    ("report",),
    ("proof", "evals", "doctor"),
    ("export", "training", "attention", "samples", "serving", "publishing"),
    ("generation",),
    ("models", "data", "losses", "distillation", "drift", "callbacks"),
    ("quantizer", "experts", "source", "columns", "datasets_in", "tables"),
    ("adapters", "synthetic", "rounding"),
    ("checkpoints", "harmony"),
    ("shards", "resume", "proven", "head"),
    ("artifacts", "gpt_oss", "sharding"),
    ("provenance", "universal"),
    ("tracking", "rules"),
    ("evaluation_rules",),
    ("config", "languages", "disk"),
    ("numerics",),
    ("errors", "allocator", "choice", "documents", "transcripts", "statistics", "direct_io", "types"),
)
"""Files and folders of the package, from top to bottom: each imports only from the rows below its own.

A new file goes into the lowest row that is above all that it imports. Stages, evals, exporters and reports are folders:
a new file in one of them needs no change here.
"""

CONTRACT: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("stages",),
    (
        *("export", "evals", "report", "proof", "training", "quantizer", "adapters", "models", "data", "losses"),
        *("synthetic", "source", "columns", "datasets_in", "tables"),
    ),
    ("checkpoints", "gpt_oss", "harmony"),
    ("numerics",),
)
"""The coarse order that the architecture promises; within a row it leaves the order to LAYERS."""

FOR_ALL = ("tracking", "artifacts", "provenance", "config", "errors")
"""May be used by everyone but numerics, and use nothing but one another."""

ONLY_IMPORTER = {
    "trl": "training",
    "peft": "adapters",
    "modelopt": "quantizer",
    "py3langid": "languages",
    "scipy": "statistics",
    "openai_harmony": "doctor.parity",
    "wandb": "tracking",
    "httpx": ("generation.client", "publishing.hub"),
    "gguf": "export.gguf_layout",
    "matplotlib": "report.plots",
    "lm_eval": "evals.harness",
    "hydra": ("__main__", "command_line"),
}


@cache
def modules() -> dict[str, Path]:
    """Name without `pipeline.` -> file; a package is called by its folder: `numerics`, `numerics.codec`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imported(name: str) -> frozenset[str]:
    """Every module that a file imports, at its top or inside a function; `from pipeline import x` is pipeline.x."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            files = {module for module in below if module.removeprefix("pipeline.") in modules()}
            found |= files
            if len(files) < len(below):
                found.add(str(node.module))
    return frozenset(found)


@cache
def own(name: str) -> frozenset[str]:
    """The modules of this package that a file imports, without `pipeline.`."""
    return frozenset(m.removeprefix("pipeline.") for m in imported(name) if m.startswith("pipeline."))


def unit(name: str) -> str:
    return name.partition(".")[0]


def libraries(name: str) -> set[str]:
    return {module.partition(".")[0] for module in imported(name)} - {"pipeline"}


def row_of(layers: tuple[tuple[str, ...], ...], name: str) -> int:
    return next(i for i, row in enumerate(layers) if unit(name) in row)


def test_every_file_has_its_place_in_the_order() -> None:
    placed = [name for row in LAYERS for name in row]
    assert len(placed) == len(set(placed))
    assert {unit(name) for name in modules() if name} == set(placed)


@pytest.mark.parametrize("name", [name for name in modules() if name])
def test_a_file_imports_only_from_below(name: str) -> None:
    wrong = [
        other for other in own(name) if unit(other) != unit(name) and row_of(LAYERS, other) <= row_of(LAYERS, name)
    ]
    assert wrong == []


def test_the_order_keeps_the_promise_of_the_architecture() -> None:
    for higher, lower in pairwise(CONTRACT):
        assert max(row_of(LAYERS, name) for name in higher) < min(row_of(LAYERS, name) for name in lower)


@pytest.mark.parametrize("name", FOR_ALL)
def test_what_everyone_may_use_uses_nothing_else(name: str) -> None:
    assert {unit(other) for other in own(name)} <= {*FOR_ALL, "numerics"}


def test_no_imports_go_round_in_a_circle() -> None:
    TopologicalSorter({name: own(name) - {name} for name in modules()}).prepare()


def test_nothing_imports_the_command_line() -> None:
    users = {name for name in modules() if {"__main__", "command_line"} & own(name)}
    assert users <= {"__main__"}


@pytest.mark.parametrize("name", [name for name in modules() if unit(name) == "numerics"])
def test_numerics_knows_nothing_but_torch(name: str) -> None:
    assert {unit(other) for other in own(name)} <= {"numerics"}
    assert libraries(name) - set(sys.stdlib_module_names) <= {"torch"}


def test_stages_never_import_stages() -> None:
    users = {name for name in modules() if any(unit(other) == "stages" for other in own(name))}
    assert users == set()


def test_only_the_command_line_and_the_stage_all_choose_stages_by_name() -> None:
    assert {name for name in modules() if "importlib" in imported(name)} == {"__main__", "stages.all"}


@pytest.mark.parametrize(("library", "importer"), ONLY_IMPORTER.items())
def test_a_big_library_has_one_importer(library: str, importer: str | tuple[str, ...]) -> None:
    expected = {importer} if isinstance(importer, str) else set(importer)
    assert {name for name in modules() if library in libraries(name)} == expected


@pytest.mark.parametrize("name", ["__main__", "command_line", "config", "errors", "tracking"])
def test_what_runs_before_a_stage_imports_no_slow_library_at_its_top(name: str) -> None:
    top = ast.parse(modules()[name].read_text(encoding="utf-8")).body
    found = {alias.name.partition(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names}
    found |= {str(node.module).partition(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
    assert found - set(sys.stdlib_module_names) <= {"hydra", "omegaconf", "pipeline"}


def test_no_file_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "helpers", "common", "base", "manager", "misc"}
    assert [name for name in modules() if empty & set(name.split("."))] == []
