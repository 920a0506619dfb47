"""The lines of prose in docs/ are short enough to compare two versions of a page."""

from collections.abc import Iterator
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
LONGEST = 140
"""Most characters of a line. Pages wrap at about 120; a few words more are no reason to wrap a paragraph again."""


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of prose with their numbers: no code, tables, headings, and no text that a script writes."""
    is_code = is_written = False
    for number, line in enumerate(text.split("\n"), 1):
        is_code ^= line.lstrip().startswith("```")
        is_written = (is_written or line.startswith("<!-- Written by")) and "End of the written" not in line
        if not is_code and not is_written and not line.lstrip().startswith(("|", "#")):
            yield number, line


@pytest.mark.parametrize("page", [path.name for path in sorted(DOCS.glob("*.md"))])
def test_no_line_of_prose_is_over_long(page: str) -> None:
    """A link cannot be broken, so a line that is only a link and a word may be longer."""
    lines = prose((DOCS / page).read_text(encoding="utf-8"))
    assert [f"{page}:{number}" for number, line in lines if len(line) > LONGEST and len(line.split()) > 2] == []


def test_code_tables_headings_and_written_text_are_no_prose() -> None:
    text = "# a\nb\n```\nc\n```\n| d |\n<!-- Written by x: y. -->\ne\n<!-- End of the written table. -->\nf"
    assert [line for _, line in prose(text) if not line.startswith(("```", "<!--"))] == ["b", "f"]
