"""Writes tables in Markdown, and replaces them in a page. The text between the tables is written by hand."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

END = "<!-- End of the written table. -->"


def replace_tables(page: Path, script: str, make: Mapping[str, Callable[[], str]], *, needs_all: bool = True) -> str:
    """Return the text of a page with new tables.

    A table stands between `<!-- Written by <script>: <name>. -->` and `END`.

    Args:
        page: the page.
        script: name of the script.
        make: name of a table -> function that makes it.
        needs_all: require each table once. Otherwise the page may have some of them.

    Raises:
        ValueError: the page lacks a table, has it twice, or names a table that does not exist.
    """
    table = re.compile(rf"(<!-- Written by {re.escape(script)}: (.*?)\. -->\n).*?{END}", re.DOTALL)
    before = page.read_text(encoding="utf-8")
    named = [match[2] for match in table.finditer(before)]
    if not set(named) <= set(make) or (needs_all and sorted(named) != sorted(make)):
        raise ValueError(f"{page} must have each of these tables once: {', '.join(make)}")
    return table.sub(lambda match: f"{match[1]}\n{make[match[2]]()}\n{END}", before)


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table. Its last line ends with a line break."""
    titles = list(head)
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
