"""`data`: the conversations to train and validate on."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Optional

from omegaconf import MISSING

from pipeline.config.bounds import BETWEEN_0_AND_1, POSITIVE, SEED


class Supervise(Enum):
    """Assistant turns of a conversation that are trained."""

    every_turn = "every_turn"
    last_turn = "last_turn"


class ReasoningEffort(Enum):
    """Values of the `Reasoning:` line of the Harmony system message."""

    low = "low"
    medium = "medium"
    high = "high"


@dataclass
class ColumnsConfig:
    """Columns of a data set. A dotted path reaches into nested objects; null means that there is no such column."""

    messages: Optional[str] = "messages"
    """Column with the list of messages. Use null if the data set has prompt and completion instead."""
    prompt: Optional[str] = None
    """Column with the text of a single user turn."""
    completion: Optional[str] = None
    """Column with the answer to the prompt."""
    reasoning: Optional[str] = None
    """Column with the reasoning that precedes the completion."""
    system: Optional[str] = None
    """Column with instructions, which are placed before the first message."""
    tools: Optional[str] = "tools"
    """Column with the functions that the model can call: a list of their schemas, or the list as JSON text."""
    reasoning_effort: Optional[str] = "reasoning_effort"
    """Column that overrides data.reasoning_effort for its row."""
    reasoning_language: Optional[str] = "reasoning_language"
    """Column that overrides data.reasoning_language for its row."""
    role: str = "role"
    """Key of a message that holds the role of its author."""
    content: str = "content"
    """Key of a message that holds its text."""
    thinking: str = "thinking"
    """Key of an assistant message that holds its reasoning."""


@dataclass
class BlendPartConfig:
    """One data set of a blend. Settings that are null follow `data`."""

    path: str = MISSING
    """As data.path."""
    weight: Annotated[float, POSITIVE] = MISSING
    """Share of the rows, relative to the weights of the other parts."""
    revision: Optional[str] = None
    """As data.revision."""
    split: Optional[str] = None
    """As data.split."""
    streaming: Optional[bool] = None
    """As data.streaming."""
    columns: Optional[ColumnsConfig] = None
    """As data.columns."""
    roles: Optional[dict[str, str]] = None
    """As data.roles."""
    filter: Optional[dict[str, list[Any]]] = None
    """As data.filter."""
    reasoning_effort: Optional[ReasoningEffort] = None
    """As data.reasoning_effort."""
    reasoning_language: Optional[str] = None
    """As data.reasoning_language."""


@dataclass
class DataConfig:
    """The conversations to train and validate on."""

    path: Optional[str] = None
    """Conversations: a .jsonl or .parquet file, a folder of them, a saved data set, a hub id, or synthetic://arithmetic."""
    revision: Optional[str] = None
    """Revision of a hub id: a branch, tag or commit."""
    split: str = "train"
    """Split of a data set on the hub, or of a saved dictionary of data sets (DatasetDict)."""
    streaming: bool = False
    """Read a data set on the hub without storing its files. Its checked rows are still stored in <run_dir>/data."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    roles: dict[str, str] = field(default_factory=dict)
    """The data set's names of roles, and their standard names: {human: user, gpt: assistant}."""
    filter: dict[str, list[Any]] = field(default_factory=dict)
    """Keep only rows that have one of the values in each of the columns: {category: [a, b]}."""
    blend: list[BlendPartConfig] = field(default_factory=list)
    """Several data sets instead of data.path, each with its weight: [{path: a.jsonl, weight: 3}, …]."""
    max_samples: Annotated[Optional[int], POSITIVE] = None
    """Use only this many rows, drawn with data.seed; null: all."""
    validation_fraction: Annotated[float, BETWEEN_0_AND_1] = 0.1
    """Share of the rows that is held out for validation and never trained on."""
    seed: Annotated[int, SEED] = 42
    """Seed of the draw of rows and of the split."""
    max_length: Annotated[int, POSITIVE] = 4096
    """Longest training example in tokens. Longer examples are truncated at the end, and counted."""
    supervise: Supervise = Supervise.every_turn
    """Assistant turns to train: every_turn (each with the prompt that it has at inference) or only the last_turn."""
    reasoning_effort: ReasoningEffort = ReasoningEffort.medium
    """The `Reasoning:` line of the system message. A row's own reasoning_effort takes precedence."""
    reasoning_language: Optional[str] = None
    """Language for the line "reasoning language: …" before the instructions; null: no line. A row's own value wins."""
    model_identity: Optional[str] = None
    """First line of the system message; null: the line of the chat template ("You are ChatGPT, …")."""
    conversation_date: str = "2025-08-05"
    """The `Current date:` line of the system message. It is fixed, so that runs can be repeated."""
