"""Group validation examples by the value of a column, or by the language of their reasoning."""

from pipeline.config import DataConfig
from pipeline.config.languages import code_of
from pipeline.data.conversations import Conversation
from pipeline.data.rows import Rows, read_rows
from pipeline.data.sampling import Numbers
from pipeline.data.sources import data_sources, with_expected
from pipeline.errors import UserError
from pipeline.runs.run import Run

_KEY = "evaluate.group_column"
_MOST_GROUPS = 100
_GROUP = "group"


def group_examples(run: Run, data: DataConfig, column: str | None, *, rows: Rows, numbers: Numbers) -> list[str]:
    """Return the group of each example: the value of `column` in its row.

    Without a column, the group is the language of the reasoning, or "" if the row names none.

    Args:
        run: the run whose directory has the tables of rows.
        data: settings of the data.
        column: the value of `evaluate.group_column`.
        rows: the rows of `data`.
        numbers: for each example, the index of its conversation in `rows`.

    Raises:
        UserError: rows lack the column, or the column has too many different values.
    """
    rows = check_column(run, data, column) or rows
    group_of = {number: _group(rows.conversations[number]) for number in sorted({*map(int, numbers)})}
    found = {*group_of.values()} - {""}
    if len(found) > _MOST_GROUPS:
        raise UserError(
            f"{_KEY}={column}: {len(found)} different values in {len(group_of)} validation rows. Name a column with"
            f" at most {_MOST_GROUPS} different values, such as a category."
        )
    return [group_of[int(number)] for number in numbers]


def check_column(run: Run, data: DataConfig, column: str | None) -> Rows | None:
    """Read the rows of `data` again, with the column of the groups. Return None without a column.

    Raises:
        UserError: rows lack the column.
    """
    return None if column is None else read_rows(run, with_expected(data_sources(data), {_GROUP: column}, _KEY))


def _group(row: Conversation) -> str:
    language = row.reasoning_language or ""
    return row.expected.get(_GROUP, code_of(language) or language)
