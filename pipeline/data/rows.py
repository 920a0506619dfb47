"""Turns data sets into conversations, and conversations into tokens and labels for training and validation.

All rows are checked before the first is used. Truncated and dropped examples are counted and reported. Rows and tokens
are kept in tables on disk (<run_dir>/data), not in memory. Later stages with the same settings use the same tables.
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

from pipeline.config import DataConfig
from pipeline.data import columns, harmony, tables
from pipeline.data import sources as sources_module
from pipeline.data.columns import Columns
from pipeline.data.harmony import IGNORED, Conversation, ConversationError, Rendering, Turn, parse_conversation
from pipeline.data.sampling import Numbers
from pipeline.data.sources import Opened, Source, Unreadable, data_sources, digest_of_files, open_rows
from pipeline.errors import Problems, UserError, joined, user_errors
from pipeline.runs.console import progress, say
from pipeline.runs.run import Run

_ROWS = Features(
    {
        "kept": Value("bool"),  # False: dropped by data.filter
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
    """The conversations of a table. Each is read from disk when it is accessed."""

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
        """The conversations with the given numbers, in the given order."""
        return Conversations(self._table.select(numbers))


@dataclass(frozen=True)
class Rows:
    """The conversations of a data set, or of the parts of a blend, one part after the other.

    Attributes:
        conversations: of the rows that data.filter keeps, in order.
        identities: hash of each conversation; copies have equal ones.
        parts: each part of the blend, and the number of its conversations.
        fingerprint: of the contents of all conversations.
    """

    conversations: Conversations
    identities: Numbers
    parts: list[tuple[Source, int]]
    fingerprint: str


def load_rows(run: Run, data: DataConfig) -> Rows:
    """Read and check the data set that `data.path` names, or those of `data.blend`.

    Raises:
        UserError: a data set does not exist, is empty, or has bad rows. All parts are reported together, and each bad
            row is named with its file and row.
    """
    return read_rows(run, data_sources(data))


def read_rows(run: Run, sources: list[Source]) -> Rows:
    """Read and check data sets.

    Raises:
        UserError: as `load_rows`.
    """
    found: list[Dataset] = []
    errors: list[UserError] = []
    for source in sources:
        try:
            found.append(_checked_table(run, source))
        except UserError as error:
            errors.append(error)
    if errors:
        raise joined(errors)
    _report_merged(found)
    kept = [_kept(source, table) for source, table in zip(sources, found, strict=True)]
    identities = np.concatenate([column_of(table, "identity") for table in kept])
    parts = [(source, len(table)) for source, table in zip(sources, kept, strict=True)]
    fingerprint = xxhash.xxh3_128_hexdigest(identities.tobytes())
    return Rows(Conversations(concatenate_datasets(kept)), identities, parts, fingerprint)


def _checked_table(run: Run, source: Source) -> Dataset:
    """The table of a data set's rows. All of them are valid."""
    opened = open_rows(source)
    data = source.data
    settings = (data.path, data.revision, data.split, data.columns, data.roles, data.filter)
    defaults = (source.reasoning_effort, source.reasoning_language)
    use = (source.expected, source.needs_answers)
    key = ("rows", opened.identity, settings, defaults, use, digest_of_files(CODE))
    return tables.table(run, key, _ROWS, lambda: _check(source, opened))


def _check(source: Source, opened: Opened) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table. Raises after the last row, so that all bad rows are reported together."""
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
        raise user_errors(missing)  # without these columns every row is bad, so the rows are not listed
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
    identity = xxhash.xxh3_64_intdigest(text.encode()) - (1 << 63)  # shifted into the range of int64
    return {
        "kept": True,
        "conversation": text,
        "where": where,
        "identity": identity,
        "expected": json.dumps(mapping.expected(row), ensure_ascii=False),
        "merged": found.merged_instructions,
    }


def _report_merged(found: list[Dataset]) -> None:
    merged = sum(int(column_of(table, "merged").sum()) for table in found)
    if merged:
        say("data", f"{merged} rows have a system and a developer message: joined, because the template takes one")


def _kept(source: Source, table: Dataset) -> Dataset:
    """The rows that data.filter keeps. Their number is reported."""
    if not source.data.filter:
        return table
    kept = np.flatnonzero(column_of(table, "kept"))
    if not len(kept):
        raise UserError(f"{source.key}.filter={source.data.filter}: keeps none of the {len(table)} rows.")
    say("data", f"{source.key}.filter keeps {len(kept)} of {len(table)} rows of {source.data.path}")
    return table.select(kept)


def _truncated(turns: list[tuple[int, Turn]], rendering: Rendering, max_length: int) -> Iterator[dict[str, Any]]:
    examples = harmony.tokenize([turn for _, turn in turns], rendering)
    for (number, _), example in zip(turns, examples, strict=True):
        cut = {key: ids[:max_length] for key, ids in example.items()}
        supervised = len(cut["labels"]) - cut["labels"].count(IGNORED)
        yield {**cut, "row": number, "length": len(example["input_ids"]), "supervised": supervised}


def column_of(table: Dataset, name: str) -> NDArray[Any]:
    return table.select_columns([name]).with_format("numpy")[:][name]
