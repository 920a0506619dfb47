"""Turns the rows of data sets into conversations.

All rows are checked before any row is used. Conversations are stored in a table on disk (<run_dir>/data), not in
memory. Later stages with the same settings reuse the table.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import xxhash
from datasets import Dataset, Features, Value, concatenate_datasets

from pipeline.config import DataConfig
from pipeline.data import (
    channels,
    columns,
    control_text,
    conversations,
    files,
    folders,
    forms,
    functions,
    json_rows,
    messages,
    parsing,
    prompts,
    tables,
    unused,
)
from pipeline.data import sources as sources_module
from pipeline.data.columns import Columns
from pipeline.data.conversations import Conversation, ConversationError
from pipeline.data.json_rows import Unreadable
from pipeline.data.parsing import parse_conversation
from pipeline.data.sampling import Numbers
from pipeline.data.sources import Opened, Source, data_sources, digest_of_code, open_rows
from pipeline.data.unused import Unused, UnusedCounts
from pipeline.errors import RowProblems, UserError, join_errors, user_errors
from pipeline.runs import foreign_files
from pipeline.runs.console import progress, say, warn
from pipeline.runs.run import DATA_DIR, Run

_ROWS = Features(
    {
        "kept": Value("bool"),  # False if data.filter drops the row
        "conversation": Value("string"),  # JSON
        "where": Value("string"),
        "identity": Value("int64"),  # hash; rows with the same contents have the same hash
        "prompt": Value("int64"),  # hash; rows with the same normalized prompt have the same hash
        "expected": Value("string"),  # JSON
        "merged": Value("bool"),
        "unused": Value("string"),  # JSON of an `Unused`
        "control": Value("string"),  # JSON of the control tokens in the text, or empty
    }
)
_MOST_PLACES = 3  # rows that a warning names
_FILTERED_OUT = {"kept": False, "identity": 0, "prompt": 0, "merged": False} | dict.fromkeys(
    ("conversation", "where", "expected", "unused", "control"), ""
)

_MODULES = (
    *(channels, columns, control_text, conversations, files, folders, forms, functions, json_rows, messages, parsing),
    *(prompts, unused),
)
CODE = [Path(__file__), *(Path(str(module.__file__)) for module in (*_MODULES, sources_module, foreign_files))]
"""Files with the code that turns rows into conversations. If this code changes, all tables are made again."""


class Conversations(Sequence[Conversation]):
    """A sequence of conversations, stored in a table. A conversation is read from disk when it is accessed."""

    def __init__(self, table: Dataset) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> "Conversations": ...
    def __getitem__(self, index: int | slice) -> "Conversation | Conversations":
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
        """Return the conversations with the given numbers, in the given order."""
        return Conversations(self._table.select(numbers))


@dataclass(frozen=True)
class Rows:
    """The conversations of a data set or of a blend. The conversations of a blend are in the order of its parts.

    Attributes:
        conversations: one conversation for each row that data.filter keeps, in order. The conversations of a data set
            for validation are the last ones.
        prompts: hash of each conversation's prompt. Equal prompts have equal hashes, see `prompts.normalize`.
        parts: one pair (data set, number of conversations) for each part of the blend. A single data set is one part.
        validation: number of conversations in the data set for validation, or 0 if there is none.
        fingerprint: hash of the contents of all conversations, and of the settings that split them into
            training and validation.
        unused: for each data set, the columns and keys that are not used.
    """

    conversations: Conversations
    prompts: Numbers
    parts: list[tuple[Source, int]]
    validation: int
    fingerprint: str
    unused: list[UnusedCounts]


def load_rows(run: Run, data: DataConfig, *, lists_unused: bool = True) -> Rows:
    """Read and check the data set that `data.path` names, or the data sets of `data.blend`.

    Args:
        run: the run whose directory holds the table of rows.
        data: settings of the data sets.
        lists_unused: whether to print the columns and keys that are not used, and control tokens in the text, if the
            rows are read for the first time.

    Raises:
        UserError: a data set does not exist, is empty, or has bad rows. The error covers all parts of a blend, and
            names the file and number of each bad row.
    """
    return read_rows(run, data_sources(data), lists_unused=lists_unused)


def read_rows(run: Run, sources: list[Source], *, lists_unused: bool = True) -> Rows:
    """Read and check data sets.

    Raises:
        UserError: see `load_rows`.
    """
    found: list[Dataset] = []
    unused: list[UnusedCounts] = []
    errors: list[UserError] = []
    for source in sources:
        try:
            table, is_new = _make_table(run, source)
            found.append(table)
            unused.append(_count_unused(source, table))
            if is_new and lists_unused:
                _print_unused(unused[-1])
                _print_control_text(source, table)
        except UserError as error:
            errors.append(error)
    if errors:
        raise join_errors(errors)
    _report_merged(found)
    kept = [_apply_filter(source, table) for source, table in zip(sources, found, strict=True)]
    _raise_if_same_rows(sources, kept)
    found_prompts = np.concatenate([column_of(table, "prompt") for table in kept])
    parts = [(source, len(table)) for source, table in zip(sources, kept, strict=True) if not source.validates]
    validation = len(found_prompts) - sum(count for _, count in parts)
    fingerprint = _hash(kept, found_prompts, [count for _, count in parts], validation)
    return Rows(Conversations(concatenate_datasets(kept)), found_prompts, parts, validation, fingerprint, unused)


def _hash(kept: list[Dataset], of_prompts: Numbers, lengths: list[int], validation: int) -> str:
    """Hash the contents of all rows, and the facts that split them into training and validation, without the settings.

    `lengths` has the number of rows of each part of a blend. The weights apply to these parts.
    """
    digest = xxhash.xxh3_128()
    for table in kept:
        digest.update(column_of(table, "identity").tobytes())
    if len(lengths) > 1:
        digest.update(f"a blend of {lengths} rows".encode())
    if validation:
        digest.update(f"the last {validation} rows validate".encode())
    elif len(np.unique(of_prompts)) < len(of_prompts):
        digest.update(of_prompts.tobytes())  # rows with the same prompt stay together
    return digest.hexdigest()


def _raise_if_same_rows(sources: list[Source], kept: list[Dataset]) -> None:
    """Raise UserError if the data set for validation has the same rows as a data set for training."""
    if not sources[-1].validates:
        return
    own = column_of(kept[-1], "identity")
    for source, table in zip(sources[:-1], kept[:-1], strict=True):
        if np.array_equal(column_of(table, "identity"), own):
            raise UserError(
                f"data.validation: its {len(own)} rows are the training rows of {source.key}.path={source.data.path}."
                " Name other rows, or set data.validation.path and data.validation.split to null to hold out a share of"
                " the rows."
            )


def _count_unused(source: Source, table: Dataset) -> UnusedCounts:
    counted = UnusedCounts(str(source.data.path), source.key)
    for value in table.data.column("unused").value_counts().to_pylist():
        if value["values"]:  # a row that data.filter drops has an empty text
            counted.add(Unused(*json.loads(value["values"])), value["counts"])
    return counted


def _print_unused(unused: UnusedCounts) -> None:
    for warning in unused.warnings():
        warn("data", warning)
    for remark in unused.remarks():
        say("data", remark)


def _print_control_text(source: Source, table: Dataset) -> None:
    counts: Counter[str] = Counter()
    for value in table.data.column("control").value_counts().to_pylist():
        counts.update(dict.fromkeys(json.loads(value["values"] or "[]"), value["counts"]))
    if not counts or not source.needs_answers:  # prompts alone are not trained
        return
    found = np.flatnonzero(table.data.column("control").to_numpy() != "")
    first = table.select(found[:_MOST_PLACES])["where"]
    warn("data", control_text.describe(len(found), dict(counts.most_common()), list(first)))


def _make_table(run: Run, source: Source) -> tuple[Dataset, bool]:
    """Check all rows of a data set, and return them as a table, and whether the table is new."""
    opened = open_rows(source, run.stage_dir(DATA_DIR))
    data = source.data
    settings = (data.path, data.revision, data.split, data.columns, data.roles, data.filter)
    defaults = (source.reasoning_effort, source.reasoning_language)
    use = (source.expected, source.needs_answers)
    key = ("rows", opened.identity, settings, defaults, use, digest_of_code(*CODE))
    started: list[bool] = []

    def rows() -> Iterator[Mapping[str, object]]:
        started.append(True)
        return _check_rows(source, opened)

    return tables.table(run, key, _ROWS, rows), bool(started)


def _check_rows(source: Source, opened: Opened) -> Iterator[Mapping[str, object]]:
    """Yield the rows of the table. After the last row, raise one error that lists all bad rows, if any."""
    mapping = Columns(source.key, source.data, source.expected, source.expected_key)
    bad, count = RowProblems(), 0
    for where, row in progress(opened.rows(), what=f"checking {source.data.path}", unit="row"):
        count += 1
        try:
            yield _check_row(source, mapping, where, row)
        except ConversationError as error:
            bad.add(where, str(error))
    if not count:
        raise UserError(f"{source.key}.path={source.data.path}: the data set is empty.")
    if missing := mapping.list_missing():
        raise user_errors(missing)  # a missing column makes every row bad, so bad rows are not listed
    bad.raise_if_any()
    if others := mapping.list_other_splits():
        raise user_errors(others)


def _check_row(source: Source, mapping: Columns, where: str, row: object) -> Mapping[str, object]:
    if isinstance(row, Unreadable):
        raise ConversationError(row.reason)
    fields = mapping.require_object(row)
    chat_row = mapping.to_chat_row(fields)
    if chat_row is None:
        return _FILTERED_OUT
    found = parse_conversation(chat_row, where, source.needs_answers, mapping.places_of_row())
    conversation = {
        "messages": found.messages,
        "tools": found.tools,
        "reasoning_effort": found.reasoning_effort or source.reasoning_effort,
        "reasoning_language": found.reasoning_language or source.reasoning_language,
    }
    text = json.dumps(conversation, ensure_ascii=False)
    return {
        "kept": True,
        "conversation": text,
        "where": where,
        "identity": _hash_text(text),
        "prompt": _hash_text(prompts.normalize(found)),
        "expected": json.dumps(mapping.read_expected(fields), ensure_ascii=False),
        "merged": found.merged_instructions,
        "unused": json.dumps(mapping.unused_of_row(), ensure_ascii=False),
        "control": json.dumps(found_tokens) if (found_tokens := control_text.find_control_text(found)) else "",
    }


def _hash_text(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode()) - (1 << 63)  # shifted into the range of int64


def _report_merged(found: list[Dataset]) -> None:
    merged = sum(int(column_of(table, "merged").sum()) for table in found)
    if merged:
        say("data", f"{merged} rows have a system and a developer message: joined, because the template takes only one")


def _apply_filter(source: Source, table: Dataset) -> Dataset:
    """Return the rows that data.filter keeps, and print their number."""
    if not source.data.filter:
        return table
    kept = np.flatnonzero(column_of(table, "kept"))
    if not len(kept):
        none = "not the only row" if len(table) == 1 else f"none of the {len(table)} rows"
        raise UserError(f"{source.key}.filter={source.data.filter}: keeps {none}.")
    say("data", f"{source.key}.filter keeps {len(kept)} of {len(table)} rows of {source.data.path}")
    return table.select(kept)


def column_of(table: Dataset, name: str) -> Numbers:
    """Return a column of numbers or booleans as int64."""
    values: Numbers = table.with_format("arrow", columns=[name])[:].column(name).to_numpy()
    return values.astype(np.int64, copy=False)
