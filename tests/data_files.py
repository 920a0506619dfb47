"""Small data sets on disk, and shortcuts that load and tokenize them.

The run's directory is `run` in the working directory.
"""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from pipeline.config import BlendPartConfig, DataConfig, ModelConfig, PipelineConfig, Stage
from pipeline.data import synthetic
from pipeline.data.conversations import Conversation
from pipeline.data.examples import Splits, prepare_examples
from pipeline.data.rows import Rows, load_rows
from pipeline.errors import UserError
from pipeline.runs.run import Run

REAL_TEXT = Path(__file__).parents[2] / "shared" / "data" / "mgsm" / "reasoning.jsonl"
"""Conversations in many languages."""

needs_real_text = pytest.mark.skipif(not REAL_TEXT.is_file(), reason=f"needs shared test data: {REAL_TEXT}")

ROWS = synthetic.arithmetic_rows()[:20]
"""The first rows of the synthetic data set."""

ADD_FUNCTION = {
    "name": "add",
    "description": "Adds two numbers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}
"""A function that a model may call."""


def config_of(path: Any, **settings: Any) -> PipelineConfig:
    data = DataConfig(path=None if path is None else str(path), **settings)
    return PipelineConfig(stage=Stage.sft, run_dir="run", model=ModelConfig(path="unused"), data=data)


def load(config: PipelineConfig) -> Rows:
    return load_rows(Run(config), config.data)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, rows: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def conversations(path: Any, **settings: Any) -> list[Conversation]:
    return list(load(config_of(path, **settings)).conversations)


def load_error(path: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(config_of(path, **settings))
    return str(caught.value)


def prepare(tokenizer: Any, path: Any, **settings: Any) -> Splits:
    config = config_of(path, **settings)
    return prepare_examples(Run(config), config.data, load(config), tokenizer)


def prepare_error(tokenizer: Any, path: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        prepare(tokenizer, path, **settings)
    return str(caught.value)


def numbered_rows(count: int, turns: int = 1) -> list[dict[str, Any]]:
    """Make `count` conversations. Every message of conversation i contains the number i."""
    return [
        {
            "messages": [
                {"role": role, "content": f"number {i}."} for _ in range(turns) for role in ("user", "assistant")
            ]
        }
        for i in range(count)
    ]


def numbers_in(tokenizer: Any, part: datasets.Dataset) -> list[int]:
    """Return the number of each example's conversation. `numbered_rows` writes this number into the messages."""
    texts = (tokenizer.decode(example["input_ids"]) for example in part)
    return [int(text.rpartition("number ")[2].partition(".")[0]) for text in texts]


def blend(*parts: BlendPartConfig) -> list[BlendPartConfig]:
    return list(parts)
