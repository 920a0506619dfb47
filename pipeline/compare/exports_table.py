"""Make the table of all exports of the runs: their layout, their size, and whether `verify` has passed."""

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.compare.digits import size
from pipeline.compare.names import without_directory
from pipeline.compare.rows import Row
from pipeline.compare.runs import EvaluatedRun
from pipeline.compare.table import Column, Table
from pipeline.runs.exports import Export
from pipeline.runs.records import ExportRecord

_TITLES = ("export", "layout", "made from", "size on disk", "verified")


@dataclass(frozen=True, kw_only=True)
class ExportsTable(Table):
    """A table with a line for each export. `lines` are its cells."""

    lines: list[list[str]]

    def cells(self, rows: Iterable[Row]) -> list[list[str]]:
        """Return the cells, line by line. The rows of the report do not matter."""
        return self.lines

    def best(self, rows: list[Row]) -> list[list[bool]]:
        """No cell is better than another, because the layouts serve different engines."""
        return [[False] * len(line) for line in self.lines]


def make(runs: list[EvaluatedRun]) -> ExportsTable | None:
    """Make the table. Return None if no run has an export."""
    prefixes = {id(run): "" if len(runs) == 1 else f"{run.label}/" for run in runs}
    lines = [_line(f"{prefixes[id(run)]}{name}", each) for run in runs for name, each in run.exports.items()]
    columns = [Column(title, lambda row: row.title) for title in _TITLES]
    caption = "Size on disk counts all files. A proof is valid for the files that `verify` read."
    return ExportsTable("Exports", columns, caption, lines=lines) if lines else None


def _line(name: str, export: Export) -> list[str]:
    origin = without_directory(export.artifact.read(ExportRecord).exported_from)
    return [name, export.target, origin, size(export.bytes), export.proof_in_words]
