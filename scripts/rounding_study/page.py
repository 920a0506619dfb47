"""Writes the tables and the plots of docs/rounding.md from the results file.

The text between the tables is written by hand.
"""

import re
from pathlib import Path

from scripts.rounding_study import plots
from scripts.rounding_study.figures import Results
from scripts.rounding_study.tables import TABLES

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "rounding.md"
_END = "<!-- End of the written table. -->"
_TABLE = re.compile(rf"(<!-- Written by scripts/study_rounding: (.*?)\. -->\n).*?{_END}", re.DOTALL)


def text(results: Path, page: Path = PAGE) -> str:
    """Return the text of the page with the tables of the results.

    Raises:
        ValueError: the page lacks a table, or names a table that does not exist.
    """
    found = Results.read(results)
    before = page.read_text(encoding="utf-8")
    named = [match[2] for match in _TABLE.finditer(before)]
    if sorted(named) != sorted(TABLES):
        raise ValueError(f"{page} must have each of these tables once: {', '.join(TABLES)}")
    return _TABLE.sub(lambda match: f"{match[1]}\n{TABLES[match[2]](found)}\n{_END}", before)


def write(results: Path, page: Path = PAGE) -> None:
    """Write the page, and its plots beside it."""
    page.write_text(text(results, page), encoding="utf-8")
    for name, plot in plots.draw(Results.read(results)).items():
        (page.parent / name).write_text(plot, encoding="utf-8")
