"""What each validation example belongs to: the value of a column of its row, or the language of its reasoning."""

from dataclasses import replace

from pipeline.config import PipelineConfig
from pipeline.config.languages import code_of
from pipeline.data.harmony import Conversation
from pipeline.data.rows import Rows, read_rows
from pipeline.data.sampling import Numbers
from pipeline.data.sources import data_sources
from pipeline.errors import UserError

_KEY = "evaluate.group_column"
_MOST_GROUPS = 100
_GROUP = "group"


def of_examples(config: PipelineConfig, rows: Rows, numbers: Numbers) -> list[str]:
    """The group of each example; "" for those whose row names no language, where no column is set.

    Args:
        config: the resolved configuration.
        rows: of `data`.
        numbers: of the examples' conversations in `rows`.

    Raises:
        UserError: rows have no such column, or there are so many values that they are no groups.
    """
    column = config.evaluate.group_column
    if column is not None:  # the same rows, read with one more of their columns
        sources = [replace(one, expected={_GROUP: column}, expected_key=_KEY) for one in data_sources(config.data)]
        rows = read_rows(config, sources)
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
