"""Imports between packages go in one direction, and each big library has one importer.

The tests read the sources and import nothing.
"""

import ast
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.house import parse

PACKAGE = Path(__file__).parents[2] / "pipeline"

ORDER: tuple[tuple[str, ...], ...] = (
    ("__main__", "library"),
    ("stages",),
    ("doctor", "quantize", "verify", "compare", "publish", "serve"),
    ("evaluate", "export", "training"),
    ("models",),
    ("data",),
    ("checkpoints",),
    ("runs",),
    ("config",),
    ("numerics", "errors"),
)
"""The packages from top to bottom: each imports only from rows below its own. docs/architecture.md shows the same."""

ONLY_IMPORTER = {
    "trl": "training.trainer",
    "peft": ("models.adapters", "models.merging"),
    "modelopt": "models.fake_quantizers",
    "py3langid": "data.languages",
    "scipy": "evaluate.statistics",
    "openai_harmony": "doctor.parity",
    "wandb": "runs.trackers.weights_and_biases",
    "mlflow": "runs.trackers.mlflow",
    "httpx": ("evaluate.generation.client", "evaluate.generation.replies", "publish.hub"),
    "gguf": "export.gguf_layout",
    "matplotlib": "compare.plots",
    "lm_eval": "evaluate.scorers.harness",
    "hydra": ("__main__", "config.command_line", "config.composition", "config.overrides"),
    "importlib": ("", "runs.one_stage", "export"),
}
"""Library -> the only modules that import it. Modules that import importlib choose other modules by name."""


READERS_OF_ARGUMENTS = {"__main__", "library.running"}
"""The modules that may import `config.command_line`."""


@cache
def modules() -> dict[str, Path]:
    """Map the name of each module, without `pipeline.`, to its file. A package has the name of its folder."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imported(name: str) -> frozenset[str]:
    """List every module that a file imports, also inside functions. `from pipeline import x` counts as pipeline.x."""
    found: set[str] = set()
    for node in ast.walk(parse(modules()[name])):
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
    """List the modules of this package that a file imports. Names are without `pipeline.`."""
    return frozenset(module.removeprefix("pipeline.") for module in imported(name) if module.startswith("pipeline."))


def unit(name: str) -> str:
    return name.partition(".")[0]


def libraries(name: str) -> set[str]:
    return {module.partition(".")[0] for module in imported(name)} - {"pipeline"}


def row_of(name: str) -> int:
    return next(i for i, row in enumerate(ORDER) if unit(name) in row)


def test_every_package_has_its_place_in_the_order() -> None:
    placed = [name for row in ORDER for name in row]
    assert len(placed) == len(set(placed))
    assert {unit(name) for name in modules() if name} == set(placed)


@pytest.mark.parametrize("name", [name for name in modules() if name])
def test_a_file_imports_only_from_packages_below_its_own(name: str) -> None:
    wrong = [other for other in own(name) if unit(other) != unit(name) and row_of(other) <= row_of(name)]
    assert wrong == []


def test_no_imports_go_round_in_a_circle() -> None:
    TopologicalSorter({name: own(name) - {name} for name in modules()}).prepare()


def test_nothing_imports_the_command_line() -> None:
    assert {name for name in modules() if "__main__" in own(name)} == set()
    assert {name for name in modules() if "config.command_line" in own(name)} <= READERS_OF_ARGUMENTS


@pytest.mark.parametrize("name", [name for name in modules() if unit(name) == "numerics"])
def test_numerics_knows_nothing_but_torch(name: str) -> None:
    assert {unit(other) for other in own(name)} <= {"numerics"}
    assert libraries(name) - set(sys.stdlib_module_names) <= {"torch"}


def test_stages_never_import_stages() -> None:
    users = {name for name in modules() if any(unit(other) == "stages" for other in own(name))}
    assert users == set()


@pytest.mark.parametrize(("library", "importer"), ONLY_IMPORTER.items())
def test_a_big_library_has_one_importer(library: str, importer: str | tuple[str, ...]) -> None:
    expected = {importer} if isinstance(importer, str) else set(importer)
    # Only importlib itself counts, because its submodules do not choose modules by name.
    users = {name for name in modules() if library in (imported(name) if library == "importlib" else libraries(name))}
    assert users == expected


@pytest.mark.parametrize(
    "name", ["__main__", "errors", *(name for name in modules() if unit(name) in ("config", "runs"))]
)
def test_what_runs_before_a_stage_imports_no_slow_library_at_its_top(name: str) -> None:
    top = parse(modules()[name]).body
    found = {alias.name.partition(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names}
    found |= {str(node.module).partition(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
    assert found - set(sys.stdlib_module_names) <= {"hydra", "omegaconf", "pipeline", "xxhash"}


@cache
def imported_at_the_top(name: str) -> frozenset[str]:
    """List every module that is imported with a file. Imports inside functions and for type checkers do not count."""
    found: set[str] = set()
    for node in parse(modules()[name]).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def loaded_with(name: str) -> set[str]:
    """List the libraries and modules that are loaded with a module, directly or through other modules."""
    seen: set[str] = set()
    todo = {f"pipeline.{name}"}
    while todo:
        module = todo.pop()
        seen.add(module)
        own_name = module.removeprefix("pipeline.")
        if module.startswith("pipeline.") and own_name in modules():
            parents = {module.rpartition(".")[0]} - {"pipeline"}
            todo |= (imported_at_the_top(own_name) | parents) - seen
    return {module.partition(".")[0] for module in seen}


@pytest.mark.parametrize("name", [name for name in modules() if unit(name) == "stages"])
def test_a_stage_loads_no_library_of_models_before_it_has_work(name: str) -> None:
    assert loaded_with(name) & {"transformers", "trl", "peft", "modelopt", "accelerate", "deepspeed", "scipy"} == set()


def test_every_package_says_what_it_is_for_and_what_it_must_not_know() -> None:
    for name in {unit(name) for name in modules() if name} - {"__main__", "errors"}:
        opening = ast.get_docstring(parse(PACKAGE / name / "__init__.py")) or ""
        assert opening.count(".") >= 2, f"pipeline/{name}/__init__.py: two sentences"


def test_no_file_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "helpers", "common", "base", "manager", "misc"}
    assert [name for name in modules() if empty & set(name.split("."))] == []
