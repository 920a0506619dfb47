"""Turns conversations into training and validation examples: chooses, splits, renders and tokenizes them.

Truncated and dropped examples are counted and reported. The examples are stored in tables on disk (<run_dir>/data),
which later stages with the same settings reuse.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xxhash
from datasets import Dataset, Features, List, Value

from pipeline.config import DataConfig, Supervise
from pipeline.data import harmony, harmony_text, sampling, scripts, tables, template_text, tool_schemas
from pipeline.data.conversations import ConversationError
from pipeline.data.harmony import Rendering
from pipeline.data.rows import CODE, Conversations, Rows, column_of
from pipeline.data.sampling import Numbers
from pipeline.data.scripts import Script
from pipeline.data.sources import digest_of_code
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import RowProblems, UserError, join_errors
from pipeline.runs.console import progress, say, warn
from pipeline.runs.run import Run

_EXAMPLES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "row": Value("int64"),  # index of the conversation in Rows.conversations
        "length": Value("int32"),  # tokens before truncation
        "supervised": Value("int32"),  # supervised tokens after truncation
    }
)
_TEXTS_AT_ONCE = 512
_CODE = [Path(str(module.__file__)) for module in (harmony, harmony_text, scripts, template_text, tool_schemas)]
"""Files with the code that turns conversations into tokens."""


@dataclass(frozen=True)
class Splits:
    """Tokenized training and validation examples. Both tables have the columns `input_ids` and `labels`.

    Attributes:
        train: examples to train on.
        validation: examples to validate on, held out or of data.validation. No held-out conversation has examples in
            both tables.
        counts: name -> count, for rows, examples, tokens, truncated examples and dropped examples.
        max_length: data.max_length, the largest number of tokens that an example may have.
        validation_rows: for each validation example, the index of its conversation in Rows.conversations.
    """

    train: Dataset
    validation: Dataset
    counts: dict[str, int]
    max_length: int
    validation_rows: Numbers


def prepare_examples(run: Run, data: DataConfig, rows: Rows, tokenizer: Tokenizer) -> Splits:
    """Choose rows, split them into training and validation, and tokenize both sets.

    Raises:
        UserError: no training example or no validation example is left, or the chat template refuses a row.
    """
    rendering = rendering_of(data, tokenizer)
    counts, chosen = _choose(data, rows)
    numbers_of = dict(zip(("train", "validation"), _split(data, rows, chosen), strict=True))
    counts |= {f"{name}_rows": len(numbers) for name, numbers in numbers_of.items()}
    if rows.validation:
        counts["validation_rows_with_training_prompts"] = _count_leaks(rows, **numbers_of)
    tokenized: dict[str, Dataset] = {}
    errors: list[UserError] = []
    for name, numbers in numbers_of.items():
        try:
            tokenized[name] = _tokenize(run, name, rows, numbers, rendering=rendering, max_length=data.max_length)
        except UserError as error:
            errors.append(error)
    if errors:
        raise join_errors(errors)
    kept = {name: _drop_unsupervised(data, name, table, counts) for name, table in tokenized.items()}
    examples = {name: table.select_columns(["input_ids", "labels"]) for name, table in kept.items()}
    return Splits(
        **examples, counts=counts, max_length=data.max_length, validation_rows=column_of(kept["validation"], "row")
    )


def rendering_of(data: DataConfig, tokenizer: Tokenizer) -> Rendering:
    """Return the settings for rendering conversations, taken from `data`."""
    return Rendering(
        tokenizer,
        data.reasoning_effort.name,
        data.conversation_date,
        data.supervise is Supervise.every_turn,
        data.reasoning_language,
        data.model_identity,
        data.rendering.name,
    )


def split_rows(data: DataConfig, rows: Rows) -> tuple[Conversations, Conversations]:
    """Return the training conversations and the validation conversations.

    data.max_samples limits their total number, without the rows of data.validation.

    Raises:
        UserError: no training conversation or no validation conversation is left.
    """
    _, chosen = _choose(data, rows)
    train, validation = (rows.conversations.select(part) for part in _split(data, rows, chosen))
    return train, validation


def _choose(data: DataConfig, rows: Rows) -> tuple[dict[str, int], Numbers]:
    """Choose rows. Return how many rows each part of a blend gives, and the chosen row numbers in a seeded order."""
    available = [count for _, count in rows.parts]
    take = sampling.shares(available, [source.weight for source, _ in rows.parts], data.max_samples)
    total = sum(take)
    if data.max_samples is not None and data.max_samples > total:
        limit = "there are only" if len(take) == 1 else "with these weights there are only"
        say("data", f"data.max_samples={data.max_samples}, but {limit} {total} rows: using all")
    used = {}
    for (source, count), taken in zip(rows.parts, take, strict=True) if data.blend else ():
        if not taken:
            raise UserError(
                f"{source.key}.weight={source.weight}: this part would get none of the {total} rows. Raise its weight,"
                " or remove the part."
            )
        say("data", f"{source.data.path}: {taken} of {count} rows, {taken / total:.1%} of the blend")
        used[f"{source.key}.rows"] = taken
    return used, sampling.choose(available, take, data.seed)


def _split(data: DataConfig, rows: Rows, chosen: Numbers) -> tuple[Numbers, Numbers]:
    if rows.validation:
        own = sampling.choose([rows.validation], [rows.validation], data.seed)  # in a seeded order
        return chosen, own + (len(rows.conversations) - rows.validation)
    held_out = round(len(chosen) * data.validation_fraction)
    train, validation = sampling.split(rows.prompts[chosen], chosen, held_out)
    if not len(train) or not len(validation):
        empty = "train on" if len(validation) else "validate on"
        count = len(np.unique(rows.prompts[chosen]))
        alike = f" They have {count} different prompts, and equal prompts stay together." if count < len(chosen) else ""
        raise UserError(
            f"data.validation_fraction={data.validation_fraction} with {_rows(len(chosen))}: no row is left to {empty}."
            f"{alike} Change it, use more rows, or set data.validation.path."
        )
    return chosen[train], chosen[validation]


def _count_leaks(rows: Rows, train: Numbers, validation: Numbers) -> int:
    """Count and report the validation rows whose prompt is also in the training rows."""
    shared = int(np.isin(rows.prompts[validation], rows.prompts[train]).sum())
    if shared:
        warn(
            "data",
            f"{shared} of {len(validation)} rows of data.validation have a prompt that is also in the training rows."
            " Their loss measures memorization. Remove them from one of the two; stage=doctor names them",
        )
    return shared


def _tokenize(run: Run, name: str, rows: Rows, numbers: Numbers, *, rendering: Rendering, max_length: int) -> Dataset:
    """Return a table with all examples of these rows. The table also includes examples without a supervised token."""
    chosen = xxhash.xxh3_128_hexdigest(numbers.tobytes())
    settings = vars(rendering) | {"tokenizer": _fingerprint(rendering.tokenizer)}
    key = ("examples", rows.fingerprint, chosen, settings, max_length, digest_of_code(*CODE, *_CODE, Path(__file__)))
    return tables.table(
        run,
        key,
        _EXAMPLES,
        lambda: _render_examples(name, rows.conversations, numbers, rendering=rendering, max_length=max_length),
    )


def _render_examples(
    name: str, conversations: Conversations, numbers: Numbers, *, rendering: Rendering, max_length: int
) -> Iterator[Mapping[str, object]]:
    """Yield the examples of these rows. After the last row, raise one error that lists all bad rows, if any."""
    bad = RowProblems()
    batch: list[tuple[int, Script]] = []
    waiting = 0
    for number in progress(numbers, what=f"tokenizing {name}", unit="row"):
        conversation = conversations[int(number)]
        try:
            batch.append((int(number), harmony.render(conversation, rendering)))
            waiting += len(batch[-1][1].texts())
        except ConversationError as error:
            bad.add(conversation.where, str(error))
        if waiting >= _TEXTS_AT_ONCE:
            yield from _tokenize_batch(batch, rendering, max_length)
            batch, waiting = [], 0
    yield from _tokenize_batch(batch, rendering, max_length)
    bad.raise_if_any()


def _tokenize_batch(
    batch: list[tuple[int, Script]], rendering: Rendering, max_length: int
) -> Iterator[Mapping[str, object]]:
    """Tokenize (row number, script) pairs, and truncate each example to `max_length` tokens."""
    made = harmony.tokenize([script for _, script in batch], rendering.tokenizer, max_length)
    for (number, _), examples in zip(batch, made, strict=True):
        for example in examples:
            yield {
                "input_ids": example.input_ids,
                "labels": example.labels,
                "row": number,
                "length": example.length,
                "supervised": example.kept_supervised,
            }


def _drop_unsupervised(data: DataConfig, name: str, table: Dataset, counts: dict[str, int]) -> Dataset:
    """Return the examples that have a supervised token.

    The function also adds the statistics of the table to `counts`, and reports truncated and dropped examples.
    """
    length, supervised = column_of(table, "length"), column_of(table, "supervised")
    kept = np.flatnonzero(supervised)
    truncated, dropped = int((length > data.max_length).sum()), len(table) - len(kept)
    if not len(kept):
        raise UserError(
            f"data.max_length={data.max_length} cuts off every supervised token of the {name} examples. Raise it."
        )
    if truncated:
        warn(
            "data",
            f"{truncated} of {len(table)} {name} examples are longer than data.max_length={data.max_length} and were"
            f" truncated; {dropped} of them had no supervised token left and were dropped",
        )
    counts |= {
        f"{name}_examples": len(kept),
        f"{name}_tokens": int(np.minimum(length[kept], data.max_length).sum()),
        f"{name}_supervised_tokens": int(supervised.sum()),
        f"{name}_examples_cut": truncated,
        f"{name}_examples_left_out": dropped,
    }
    return table.select(kept) if dropped else table


def _fingerprint(tokenizer: Tokenizer) -> str:
    """Hash everything that affects the tokens of a conversation: library versions, chat template and tokenizer."""
    libraries = [version(library) for library in ("transformers", "tokenizers")]
    text = f"{libraries}{tokenizer.chat_template}{tokenizer.backend_tokenizer.to_str()}"
    return xxhash.xxh3_128_hexdigest(text.encode())


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
