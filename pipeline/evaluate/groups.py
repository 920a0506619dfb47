"""The group of each validation example: the value of a column of its row, or the language of its reasoning."""

from dataclasses import replace

from pipeline.config import DataConfig
from pipeline.config.languages import code_of
from pipeline.data.harmony import Conversation
from pipeline.data.rows import Rows, read_rows
from pipeline.data.sampling import Numbers
from pipeline.data.sources import data_sources
from pipeline.errors import UserError
from pipeline.runs.run import Run

_KEY = "evaluate.group_column"
_MOST_GROUPS = 100
_GROUP = "group"


def group_examples(run: Run, data: DataConfig, column: str | None, *, rows: Rows, numbers: Numbers) -> list[str]:
    """Return the group of each example; without a column, the language of its reasoning, or "" if it names none.

    Args:
        run: the run whose directory has the tables of rows.
        data: settings of the data.
        column: `evaluate.group_column`.
        rows: the rows of `data`.
        numbers: for each example, the number of its conversation in `rows`.

    Raises:
        UserError: rows lack the column, or it has too many values for groups.
    """
    if column is not None:  # the same rows, read with one more of their columns
        sources = [replace(one, expected={_GROUP: column}, expected_key=_KEY) for one in data_sources(data)]
        rows = read_rows(run, sources)
    group_of = {number: _group(rows.conversations[number]) for number in sorted({*map(int, numbers)})}
    found = {*group_of.values()} - {""}
    if len(found) > _MOST_GROUPS:
        raise UserError(
            f"{_KEY}={column}: {len(found)} different values in {len(group_of)} validation rows. Name a column of at"
            f" most {_MOST_GROUPS} groups, such as a category."
        )
    return [group_of[int(number)] for number in numbers]


def _group(row: Conversation) -> str:
    language = row.reasoning_language or ""
    return row.expected.get(_GROUP, code_of(language) or language)
