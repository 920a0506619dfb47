"""The notebook in docs/ runs from top to bottom in a Jupyter kernel, and shows the plots of the report."""

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "pipeline.ipynb"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of the kernel."""
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def cells(directory: Path) -> list[Any]:
    """The cells of the notebook, after they have run."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(directory)}}
    )
    client.execute(env={**environment, "IPYTHONDIR": str(directory / "ipython")})
    return list(notebook.cells)


def outputs(cells: list[Any]) -> list[Any]:
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


def test_the_notebook_is_stored_without_outputs() -> None:
    stored = nbformat.read(NOTEBOOK, as_version=4)
    assert outputs(stored.cells) == []
    assert {cell.execution_count for cell in stored.cells if cell.cell_type == "code"} == {None}


def test_every_stage_of_the_notebook_is_complete(cells: list[Any], directory: Path) -> None:
    stages = ("doctor", "upcast", "sft", "quantize", "qat", "export", "verify", "evaluate", "compare")
    run = directory / "runs" / "notebook"
    assert [stage for stage in stages if not (run / stage / "artifact.json").is_file()] == []


def test_the_notebook_shows_every_plot_of_the_report(cells: list[Any], directory: Path) -> None:
    plots = list((directory / "runs" / "notebook" / "compare").glob("*.png"))
    shown = [output for output in outputs(cells) if "image/png" in output.get("data", {})]
    assert len(shown) == len(plots) >= 5


def test_the_notebook_shows_the_checks_the_report_and_the_mistakes(cells: list[Any]) -> None:
    text = "".join(str(output.get("text", "")) + str(output.get("data", "")) for output in outputs(cells))
    assert "text/markdown" in text and "Did you mean 'sft.learning_rate'" in text
    assert "FAILED" not in text and "distance: every tensor is finite and resembles the base model" in text
    assert "(8, 96, 64) → blocks (8, 64, 3, 16) and scales (8, 64, 3)" in text


def test_no_cell_writes_to_standard_error_but_notes_of_the_program(cells: list[Any]) -> None:
    lines = [line for each in outputs(cells) if each.get("name") == "stderr" for line in each.text.splitlines()]
    assert [line for line in lines if line and not line.startswith("[")] == []
