"""Data sets -> conversations -> tokens and labels; the split into training and validation.

Every row is checked before the first is used; what is cut or left out is counted and said. Neither rows nor tokens are
held in memory: both are tables on disk, kept in <run_dir>/data for the next stage that asks for the same.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset, Features, List, Value, concatenate_datasets
from numpy.typing import NDArray

from pipeline import choice, columns, datasets_in, harmony, tables
from pipeline.choice import Numbers
from pipeline.columns import Columns
from pipeline.config import DataConfig, PipelineConfig, Supervise
from pipeline.datasets_in import Opened, Source, Unreadable
from pipeline.errors import UserError, user_errors
from pipeline.harmony import IGNORED, Conversation, ConversationError, Rendering, Turn, parse_conversation
from pipeline.tracking import progress, say, warn

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
_EXAMPLES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "row": Value("int64"),  # number of its conversation
        "length": Value("int32"),  # tokens before the cut
        "supervised": Value("int32"),  # supervised tokens after it
    }
)
_FILTERED_OUT = {"kept": False, "conversation": "", "where": "", "identity": 0, "expected": "", "merged": False}
_CODE = [Path(__file__), *(Path(str(module.__file__)) for module in (columns, datasets_in, harmony))]
_MOST_PROBLEMS = 8
_TURNS_AT_ONCE = 256


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


@dataclass(frozen=True)
class Splits:
    """Tokenized training and validation examples: columns `input_ids` and `labels`.

    Attributes:
        train: examples to learn from.
        validation: examples held out; no conversation is in both.
        counts: what went in, and what was cut.
        max_length: tokens that no example is longer than.
        validation_rows: of each validation example the number of its conversation in Rows.
    """

    train: Dataset
    validation: Dataset
    counts: dict[str, int]
    max_length: int
    validation_rows: Numbers


class _BadRows(Exception):
    """What is wrong with rows: the first few in words, the rest in number, so that no set is too large to be wrong."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._count = 0

    def add(self, problem: str) -> None:
        self._count += 1
        if len(self._first) < _MOST_PROBLEMS:
            self._first.append(problem)

    def raise_if_any(self) -> None:
        if self._count:
            raise self

    def lines(self) -> list[str]:
        rest = self._count - len(self._first)
        return [*self._first, f"and {rest} more"] if rest else self._first


def load_rows(config: PipelineConfig) -> Rows:
    """Read and check the data set that `data.path` names, or those of `data.blend`.

    Raises:
        UserError: one is not there, empty, or has bad rows: each with its file and row; those of all parts together.
    """
    return read(config, datasets_in.sources(config.data))


def read(config: PipelineConfig, sources: list[Source]) -> Rows:
    """Read and check data sets.

    Raises:
        UserError: as `load_rows`.
    """
    found: list[Dataset] = []
    problems: list[str] = []
    for source in sources:
        try:
            found.append(_checked(config, source))
        except _BadRows as bad:
            problems += bad.lines()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise user_errors(problems)
    _say_what_was_joined(found)
    kept = [_kept(source, table) for source, table in zip(sources, found, strict=True)]
    identities = np.concatenate([_column(table, "identity") for table in kept])
    parts = [(source, len(table)) for source, table in zip(sources, kept, strict=True)]
    fingerprint = xxhash.xxh3_128_hexdigest(identities.tobytes())
    return Rows(Conversations(concatenate_datasets(kept)), identities, parts, fingerprint)


def prepare(config: PipelineConfig, rows: Rows, tokenizer: Any) -> Splits:
    """Choose, split, render and tokenize.

    Raises:
        UserError: nothing is left to train on or to validate on, or the template refuses a row.
    """
    data, how = config.data, rendering(config, tokenizer)
    counts, chosen = _choose(data, rows)
    numbers_of = dict(zip(("train", "validation"), _split(data, rows, chosen), strict=True))
    counts |= {f"{name}_rows": len(numbers) for name, numbers in numbers_of.items()}
    tokenized: dict[str, Dataset] = {}
    problems: list[str] = []
    for name, numbers in numbers_of.items():
        try:
            tokenized[name] = _tokenized(config, name, rows, numbers, how)
        except _BadRows as bad:
            problems += bad.lines()
    if problems:
        raise user_errors(problems)
    kept = {name: _supervised(data, name, table, counts) for name, table in tokenized.items()}
    examples = {name: table.select_columns(["input_ids", "labels"]) for name, table in kept.items()}
    return Splits(
        **examples, counts=counts, max_length=data.max_length, validation_rows=_column(kept["validation"], "row")
    )


def rendering(config: PipelineConfig, tokenizer: Any) -> Rendering:
    """How the settings want conversations rendered."""
    data = config.data
    return Rendering(
        tokenizer,
        data.reasoning_effort.name,
        data.conversation_date,
        data.supervise is Supervise.every_turn,
        data.reasoning_language,
        data.model_identity,
    )


def split(config: PipelineConfig, rows: Rows) -> tuple[Conversations, Conversations]:
    """The conversations to train on and those to validate on; data.max_samples may leave some out of both.

    Raises:
        UserError: there are none to train on or to validate on.
    """
    _, chosen = _choose(config.data, rows)
    train, validation = (rows.conversations.select(part) for part in _split(config.data, rows, chosen))
    return train, validation


def _checked(config: PipelineConfig, source: Source) -> Dataset:
    """The table of a data set's rows, every one of them valid."""
    opened = datasets_in.open_rows(source)
    data = source.data
    settings = (data.path, data.revision, data.split, data.columns, data.roles, data.filter)
    defaults = (source.reasoning_effort, source.reasoning_language)
    use = (source.expected, source.needs_answers)
    key = ("rows", opened.identity, settings, defaults, use, datasets_in.digest(_CODE))
    return tables.table(config, key, _ROWS, lambda: _check(source, opened))


def _check(source: Source, opened: Opened) -> Iterator[dict[str, Any]]:
    """Rows of the table; raises after the last row, so that all bad ones are reported together."""
    mapping = Columns(source.key, source.data, source.expected, source.expected_key)
    bad, count = _BadRows(), 0
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
    joined = sum(int(_column(table, "merged").sum()) for table in found)
    if joined:
        say("data", f"{joined} rows have a system and a developer message: joined, since the template takes one")


def _kept(source: Source, table: Dataset) -> Dataset:
    """The rows that data.filter leaves, and how many that is."""
    if not source.data.filter:
        return table
    kept = np.flatnonzero(_column(table, "kept"))
    if not len(kept):
        raise UserError(f"{source.key}.filter={source.data.filter}: leaves none of the {len(table)} rows.")
    say("data", f"{source.key}.filter keeps {len(kept)} of {len(table)} rows of {source.data.path}")
    return table.select(kept)


def _choose(data: DataConfig, rows: Rows) -> tuple[dict[str, int], Numbers]:
    """What is used of each part of a blend, and the numbers of the chosen rows in their seeded order."""
    available = [count for _, count in rows.parts]
    take = choice.shares(available, [source.weight for source, _ in rows.parts], data.max_samples)
    total = sum(take)
    if data.max_samples is not None and data.max_samples > total:
        limit = "there are only" if len(take) == 1 else "with these weights there are only"
        say("data", f"data.max_samples={data.max_samples}, but {limit} {total} rows: using all")
    used = {}
    for (source, count), taken in zip(rows.parts, take, strict=True) if data.blend else ():
        if not taken:
            raise UserError(
                f"{source.key}.weight={source.weight}: less than one row of {total}. Raise it, or leave it out."
            )
        say("data", f"{source.data.path}: {taken} of {count} rows, {taken / total:.1%} of the blend")
        used[f"{source.key}.rows"] = taken
    return used, choice.choose(available, take, data.seed)


def _split(data: DataConfig, rows: Rows, chosen: Numbers) -> tuple[Numbers, Numbers]:
    held_out = round(len(chosen) * data.validation_fraction)
    train, validation = choice.split(rows.identities[chosen], held_out)
    if not len(train) or not len(validation):
        empty = "train on" if len(validation) else "validate on"
        raise UserError(
            f"data.validation_fraction={data.validation_fraction} of {len(chosen)} rows leaves none to {empty}."
            " Change it, or use more rows."
        )
    return chosen[train], chosen[validation]


def _tokenized(config: PipelineConfig, name: str, rows: Rows, numbers: Numbers, rendering: Rendering) -> Dataset:
    """The table of all examples of these rows, those without a supervised token included."""
    chosen = xxhash.xxh3_128_hexdigest(numbers.tobytes())
    settings = replace(rendering, tokenizer=_fingerprint(rendering.tokenizer))
    key = ("examples", rows.fingerprint, chosen, settings, config.data.max_length, datasets_in.digest(_CODE))
    return tables.table(
        config, key, _EXAMPLES, lambda: _examples(name, rows.conversations, numbers, rendering, config.data.max_length)
    )


def _examples(
    name: str, conversations: Conversations, numbers: Numbers, rendering: Rendering, max_length: int
) -> Iterator[dict[str, Any]]:
    bad = _BadRows()
    turns: list[tuple[int, Turn]] = []
    for number in progress(numbers, what=f"tokenizing {name}", unit="row"):
        conversation = conversations[int(number)]
        try:
            turns += [(int(number), turn) for turn in harmony.turns(conversation, rendering)]
        except ConversationError as error:
            bad.add(f"{conversation.where}: {error}.")
        if len(turns) >= _TURNS_AT_ONCE:
            yield from _cut(turns, rendering, max_length)
            turns = []
    yield from _cut(turns, rendering, max_length)
    bad.raise_if_any()


def _cut(turns: list[tuple[int, Turn]], rendering: Rendering, max_length: int) -> Iterator[dict[str, Any]]:
    examples = harmony.tokenize([turn for _, turn in turns], rendering)
    for (number, _), example in zip(turns, examples, strict=True):
        cut = {key: ids[:max_length] for key, ids in example.items()}
        supervised = len(cut["labels"]) - cut["labels"].count(IGNORED)
        yield {**cut, "row": number, "length": len(example["input_ids"]), "supervised": supervised}


def _supervised(data: DataConfig, name: str, table: Dataset, counts: dict[str, int]) -> Dataset:
    """The examples that something can be learned from; counts them, and says what was cut and left out."""
    length, supervised = _column(table, "length"), _column(table, "supervised")
    kept = np.flatnonzero(supervised)
    cut, lost = int((length > data.max_length).sum()), len(table) - len(kept)
    if not len(kept):
        raise UserError(
            f"data.max_length={data.max_length} cuts away every supervised token of the {name} examples: raise it."
        )
    if cut:
        warn(
            "data",
            f"{cut} of {len(table)} {name} examples are longer than data.max_length={data.max_length} and were"
            f" cut; {lost} of them had no supervised token left and were left out",
        )
    counts |= {
        f"{name}_examples": len(kept),
        f"{name}_tokens": int(np.minimum(length[kept], data.max_length).sum()),
        f"{name}_supervised_tokens": int(supervised.sum()),
        f"{name}_examples_cut": cut,
        f"{name}_examples_left_out": lost,
    }
    return table.select(kept) if lost else table


def _column(table: Dataset, name: str) -> NDArray[Any]:
    return table.select_columns([name]).with_format("numpy")[:][name]


def _fingerprint(tokenizer: Any) -> str:
    """Of all that decides what a tokenizer makes of a conversation."""
    libraries = [version(library) for library in ("transformers", "tokenizers")]
    text = f"{libraries}{tokenizer.chat_template}{tokenizer.backend_tokenizer.to_str()}"
    return xxhash.xxh3_128_hexdigest(text.encode())
