"""Data sets -> conversations -> tokens and labels; the split into training and validation.

Every row is checked before the first is used; what is cut or left out is counted and said.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset

from pipeline import synthetic
from pipeline.checkpoints import at_most
from pipeline.config import SYNTHETIC, DataConfig, PipelineConfig, Supervise
from pipeline.errors import UserError, user_errors
from pipeline.harmony import IGNORED, Conversation, ConversationError, Rendering, examples, parse_conversation
from pipeline.tracking import progress, say, warn

_FILES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Rows:
    """The conversations of a data set.

    Attributes:
        conversations: the valid rows, in order.
        fingerprint: of their contents.
    """

    conversations: list[Conversation]
    fingerprint: str


@dataclass(frozen=True)
class _Unreadable:
    """Stands for a row that could not be read, so that it is reported with the other bad rows."""

    reason: str


@dataclass(frozen=True)
class Splits:
    """Tokenized training and validation examples: columns `input_ids` and `labels`.

    Attributes:
        train: examples to learn from.
        validation: examples held out; no conversation is in both.
        counts: what went in, and what was cut.
    """

    train: Dataset
    validation: Dataset
    counts: dict[str, int]


def load_rows(config: PipelineConfig) -> Rows:
    """Read and check the data set that `data.path` names.

    Raises:
        UserError: it is not there, empty, or has bad rows: each with its file and row.
    """
    data = config.data
    conversations: list[Conversation] = []
    problems: list[str] = []
    digest = xxhash.xxh3_128()
    for where, row in _raw_rows(data):
        if isinstance(row, _Unreadable):
            problems.append(f"{where}: {row.reason}.")
            continue
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        try:
            conversations.append(parse_conversation(row, where))
        except ConversationError as error:
            problems.append(f"{where}: {error}.")
    if problems:
        raise user_errors(at_most(problems))
    if not conversations:
        raise UserError(f"data.path={data.path}: the data set is empty.")
    merged = sum(conversation.merged_instructions for conversation in conversations)
    if merged:
        say("data", f"{merged} rows have a system and a developer message: joined, since the template takes one")
    return Rows(conversations, digest.hexdigest())


def prepare(config: PipelineConfig, rows: Rows, tokenizer: Any) -> Splits:
    """Choose, split, render and tokenize.

    Raises:
        UserError: nothing is left to train on or to validate on, or the template refuses a row.
    """
    train, validation = split(config, rows)
    how = rendering(config, tokenizer)
    counts: dict[str, int] = {"train_rows": len(train), "validation_rows": len(validation)}
    tokenized = {}
    for name, part in (("train", train), ("validation", validation)):
        tokenized[name] = _tokenize(name, part, how, config.data, counts)
    return Splits(tokenized["train"], tokenized["validation"], counts)


def rendering(config: PipelineConfig, tokenizer: Any) -> Rendering:
    """How the settings want conversations rendered."""
    data = config.data
    every_turn = data.supervise is Supervise.every_turn
    return Rendering(tokenizer, data.reasoning_effort.name, data.conversation_date, every_turn)


def split(config: PipelineConfig, rows: Rows) -> tuple[list[Conversation], list[Conversation]]:
    """The conversations to train on and those to validate on; data.max_samples may leave some out of both.

    Raises:
        UserError: there are none to train on or to validate on.
    """
    import torch

    data, conversations = config.data, rows.conversations
    order = torch.randperm(len(conversations), generator=torch.Generator().manual_seed(data.seed)).tolist()
    if data.max_samples is not None and data.max_samples > len(order):
        say("data", f"data.max_samples={data.max_samples}, but there are only {len(order)} rows: using all")
    chosen = [conversations[i] for i in order[: data.max_samples]]
    wanted = round(len(chosen) * data.validation_fraction)
    copies: dict[str, list[Conversation]] = {}
    for conversation in chosen:
        copies.setdefault(_identity(conversation), []).append(conversation)
    parts: tuple[list[Conversation], list[Conversation]] = ([], [])
    for same in copies.values():  # all copies of a conversation go the same way
        parts[len(parts[1]) < wanted].extend(same)
    train, validation = parts
    if not train or not validation:
        empty = "train on" if validation else "validate on"
        raise UserError(
            f"data.validation_fraction={data.validation_fraction} of {len(chosen)} rows leaves none to {empty}."
            " Change it, or use more rows."
        )
    return train, validation


def _identity(conversation: Conversation) -> str:
    return json.dumps([conversation.messages, conversation.tools, conversation.reasoning_effort], sort_keys=True)


def _tokenize(
    name: str, conversations: list[Conversation], rendering: Rendering, data: DataConfig, counts: dict[str, int]
) -> Dataset:
    kept: list[dict[str, list[int]]] = []
    cut = lost = 0
    problems: list[str] = []
    for conversation in progress(conversations, what=f"tokenizing {name}", unit="row"):
        try:
            rendered = examples(conversation, rendering)
        except ConversationError as error:
            problems.append(f"{conversation.where}: {error}.")
            continue
        for example in rendered:
            cut += len(example["input_ids"]) > data.max_length
            example = {key: ids[: data.max_length] for key, ids in example.items()}
            if all(label == IGNORED for label in example["labels"]):
                lost += 1
            else:
                kept.append(example)
    if problems:
        raise user_errors(at_most(problems))
    if not kept:
        raise UserError(
            f"data.max_length={data.max_length} cuts away every supervised token of the {name} examples: raise it."
        )
    if cut:
        warn(
            "data",
            f"{cut} of {len(kept) + lost} {name} examples are longer than data.max_length={data.max_length} and were"
            f" cut; {lost} of them had no supervised token left and were left out",
        )
    counts |= {
        f"{name}_examples": len(kept),
        f"{name}_tokens": sum(len(example["input_ids"]) for example in kept),
        f"{name}_supervised_tokens": sum(label != IGNORED for example in kept for label in example["labels"]),
        f"{name}_examples_cut": cut,
        f"{name}_examples_left_out": lost,
    }
    return Dataset.from_list(kept)


def _raw_rows(data: DataConfig) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of every row; rows of a file are counted from 1, as editors do."""
    if data.path is None:
        raise UserError("data.path: is not set. Give data.path=<file, folder or hub id>, or choose a recipe.")
    if data.path.startswith(SYNTHETIC):
        if data.path != f"{SYNTHETIC}arithmetic":
            raise UserError(f"data.path={data.path!r}: no such synthetic data set. Use {SYNTHETIC}arithmetic.")
        yield from _numbered(data.path, synthetic.arithmetic_rows())
        return
    path = Path(data.path).expanduser()
    if path.is_file():
        yield from _file_rows(path)
    elif path.is_dir():
        yield from _folder_rows(path, data)
    elif _looks_like_hub_id(data.path):
        yield from _numbered(f"{data.path} ({data.split})", _fetch(data.path, data))
    else:
        raise UserError(f"data.path={data.path}: no such file or folder.")


def _looks_like_hub_id(path: str) -> bool:
    return path.count("/") <= 1 and not path.startswith((".", "/", "~")) and Path(path).suffix not in _FILES


def _numbered(where: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{where}: row {i}", row) for i, row in enumerate(rows, 1))


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".jsonl":
        yield from _jsonl_rows(path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        raise UserError(f"data.path={path}: must be {' or '.join(_FILES)}, a folder of them, or a saved data set.")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                row = _Unreadable(f"not valid JSON ({error})")
            yield f"{path}: row {number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        rows = (row for batch in table.iter_batches(1024) for row in batch.to_pylist())
        yield from _numbered(str(path), rows)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error}).") from error


def _folder_rows(path: Path, data: DataConfig) -> Iterator[tuple[str, Any]]:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from _numbered(str(path), _saved(path, data))
        return
    files = sorted(p for p in path.iterdir() if p.suffix in _FILES and p.is_file())
    if not files:
        raise UserError(f"data.path={path}: holds neither {' nor '.join(_FILES)} files nor a saved data set.")
    for file in files:
        yield from _file_rows(file)


def _saved(path: Path, data: DataConfig) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except IndexError as error:  # how datasets 5.2 meets a data set without rows
        raise UserError(f"data.path={path}: the data set is empty.") from error
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable saved data set ({error}).") from error
    if not isinstance(loaded, DatasetDict):
        return loaded
    if data.split not in loaded:
        raise UserError(f"data.split={data.split}: {path} has the splits {', '.join(loaded)}.")
    return loaded[data.split]


def _fetch(hub_id: str, data: DataConfig) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(hub_id, split=data.split, revision=data.revision)
    except (DatasetsError, ValueError, OSError) as error:
        raise UserError(
            f"data.path={data.path!r}, data.split={data.split!r}: no such file or folder, and the hub could not be"
            f" asked or does not have it ({str(error).strip().splitlines()[0]})."
        ) from error
