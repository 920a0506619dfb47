"""Writes the tables and the plots of docs/rounding.md from the results file."""

from functools import partial
from pathlib import Path

from scripts.rounding_study import plots
from scripts.rounding_study.figures import Results
from scripts.rounding_study.tables import TABLES
from scripts.written_tables import replace_tables

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "rounding.md"


def text(results: Path, page: Path = PAGE) -> str:
    """Return the text of the page with the tables of the results.

    Raises:
        ValueError: the page lacks a table, or names a table that does not exist.
    """
    found = Results.read(results)
    return replace_tables(page, "scripts/study_rounding", {name: partial(make, found) for name, make in TABLES.items()})


def write(results: Path, page: Path = PAGE) -> None:
    """Write the page, and its plots beside it."""
    page.write_text(text(results, page), encoding="utf-8")
    for name, plot in plots.draw(Results.read(results)).items():
        (page.parent / name).write_text(plot, encoding="utf-8")
