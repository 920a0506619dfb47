"""Writes the results of the study into docs/story.md and README.md, and draws their plot."""

from functools import partial
from pathlib import Path

from scripts.demo_study import plot
from scripts.demo_study.results import Results
from scripts.demo_study.tables import TABLES
from scripts.written_tables import replace_tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "demo.json"
STORY, README = ROOT / "docs" / "story.md", ROOT / "README.md"
PLOT = ROOT / "docs" / "demo.svg"
_SCRIPT = "scripts/study_demo"


def texts(results: Path) -> dict[Path, str]:
    """Return the pages with the tables of the results.

    Raises:
        ValueError: docs/story.md lacks a table, or a page names a table that does not exist.
    """
    found = Results.read(results)
    tables = {name: partial(make, found) for name, make in TABLES.items()}
    return {
        STORY: replace_tables(STORY, _SCRIPT, tables),
        README: replace_tables(README, _SCRIPT, tables, needs_all=False),
    }


def write(results: Path) -> None:
    """Write the pages and the plot."""
    for page, text in texts(results).items():
        page.write_text(text, encoding="utf-8")
    PLOT.write_text(plot.draw(Results.read(results)), encoding="utf-8")
