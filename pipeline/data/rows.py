"""Data sets -> conversations -> tokens and labels; the split into training and validation.

Every row is checked before the first is used; what is cut or left out is counted and said. Neither rows nor tokens are
held in memory: both are tables on disk, kept in <run_dir>/data for the next stage that asks for the same.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset, Features, Value, concatenate_datasets
from numpy.typing import NDArray

from pipeline.config import PipelineConfig
from pipeline.data import columns, harmony, tables
from pipeline.data import sources as sources_module
from pipeline.data.columns import Columns
from pipeline.data.harmony import Conversation, ConversationError, parse_conversation
from pipeline.data.sampling import Numbers
from pipeline.data.sources import Opened, Source, Unreadable, data_sources, digest_of_files, open_rows
from pipeline.errors import Problems, UserError, joined, user_errors
from pipeline.runs.console import progress, say

_ROWS = Features(
    {
        "kept": Value("bool"),  # False: left out by data.filter
        "conversation": Value("string"),  # JSON
        "where": Value("string"),
        "identity": Value("int64"),  # equal for rows with the same contents
        "expected": Value("string"),  # JSON
        "merged": Value("bool"),
    }
)
_FILTERED_OUT = {"kept": False, "conversation": "", "where": "", "identity": 0, "expected": "", "merged": False}
CODE = [Path(__file__), *(Path(str(module.__file__)) for module in (columns, sources_module, harmony))]


class Conversations(Sequence[Conversation]):
    """The conversations of a table, each read when it is asked for."""

    def __init__(self, table: Dataset) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Conversations(self._table.select(range(len(self))[index]))
        row = self._table[index]
        return Conversation(
            **json.loads(row["conversation"]),
            merged_instructions=row["merged"],
            where=row["where"],
            expected=json.loads(row["expected"]),
        )

    def select(self, numbers: Numbers) -> "Conversations":
        """Those of the given numbers, in that order."""
        return Conversations(self._table.select(numbers))


@dataclass(frozen=True)
class Rows:
    """The conversations of a data set, or of the parts of a blend, one part after the other.

    Attributes:
        conversations: the valid rows, in order.
        identities: of the conversations, equal for copies.
        parts: where the conversations come from, and how many of them each part has.
        fingerprint: of their contents.
    """

    conversations: Conversations
    identities: Numbers
    parts: list[tuple[Source, int]]
    fingerprint: str


def load_rows(config: PipelineConfig) -> Rows:
    """Read and check the data set that `data.path` names, or those of `data.blend`.

    Raises:
        UserError: one is not there, empty, or has bad rows: each with its file and row; those of all parts together.
    """
    return read_rows(config, data_sources(config.data))


def read_rows(config: PipelineConfig, sources: list[Source]) -> Rows:
    """Read and check data sets.

    Raises:
        UserError: as `load_rows`.
    """
    found: list[Dataset] = []
    errors: list[UserError] = []
    for source in sources:
        try:
            found.append(_checked(config, source))
        except UserError as error:
            errors.append(error)
    if errors:
        raise joined(errors)
    _say_what_was_joined(found)
    kept = [_kept(source, table) for source, table in zip(sources, found, strict=True)]
    identities = np.concatenate([column_of(table, "identity") for table in kept])
    parts = [(source, len(table)) for source, table in zip(sources, kept, strict=True)]
    fingerprint = xxhash.xxh3_128_hexdigest(identities.tobytes())
    return Rows(Conversations(concatenate_datasets(kept)), identities, parts, fingerprint)


def _checked(config: PipelineConfig, source: Source) -> Dataset:
    """The table of a data set's rows, every one of them valid."""
    opened = open_rows(source)
    data = source.data
    settings = (data.path, data.revision, data.split, data.columns, data.roles, data.filter)
    defaults = (source.reasoning_effort, source.reasoning_language)
    use = (source.expected, source.needs_answers)
    key = ("rows", opened.identity, settings, defaults, use, digest_of_files(CODE))
    return tables.table(config, key, _ROWS, lambda: _check(source, opened))


def _check(source: Source, opened: Opened) -> Iterator[dict[str, Any]]:
    """Rows of the table; raises after the last row, so that all bad ones are reported together."""
    mapping = Columns(source.key, source.data, source.expected, source.expected_key)
    bad, count = Problems(), 0
    for where, row in progress(opened.rows(), what=f"checking {source.data.path}", unit="row"):
        count += 1
        try:
            yield _checked_row(source, mapping, where, row)
        except ConversationError as error:
            bad.add(f"{where}: {error}.")
    if not count:
        raise UserError(f"{source.key}.path={source.data.path}: the data set is empty.")
    if missing := mapping.missing():
        raise user_errors(missing)  # these alone: no row can be right without them
    bad.raise_if_any()


def _checked_row(source: Source, mapping: Columns, where: str, row: Any) -> dict[str, Any]:
    if isinstance(row, Unreadable):
        raise ConversationError(row.reason)
    chat_row = mapping.chat_row(row)
    if chat_row is None:
        return _FILTERED_OUT
    found = parse_conversation(chat_row, where, source.needs_answers)
    conversation = {
        "messages": found.messages,
        "tools": found.tools,
        "reasoning_effort": found.reasoning_effort or source.reasoning_effort,
        "reasoning_language": found.reasoning_language or source.reasoning_language,
    }
    text = json.dumps(conversation, ensure_ascii=False)
    identity = xxhash.xxh3_64_intdigest(text.encode()) - (1 << 63)  # into the range of int64
    return {
        "kept": True,
        "conversation": text,
        "where": where,
        "identity": identity,
        "expected": json.dumps(mapping.expected(row), ensure_ascii=False),
        "merged": found.merged_instructions,
    }


def _say_what_was_joined(found: list[Dataset]) -> None:
    joined = sum(int(column_of(table, "merged").sum()) for table in found)
    if joined:
        say("data", f"{joined} rows have a system and a developer message: joined, since the template takes one")


def _kept(source: Source, table: Dataset) -> Dataset:
    """The rows that data.filter leaves, and how many that is."""
    if not source.data.filter:
        return table
    kept = np.flatnonzero(column_of(table, "kept"))
    if not len(kept):
        raise UserError(f"{source.key}.filter={source.data.filter}: leaves none of the {len(table)} rows.")
    say("data", f"{source.key}.filter keeps {len(kept)} of {len(table)} rows of {source.data.path}")
    return table.select(kept)


def column_of(table: Dataset, name: str) -> NDArray[Any]:
    return table.select_columns([name]).with_format("numpy")[:][name]
