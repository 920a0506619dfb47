"""Settings of `data`: the conversations for training and validation."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Optional

from omegaconf import MISSING

from pipeline.config.bounds import BETWEEN_0_AND_1, POSITIVE, SEED


class Supervise(Enum):
    """The assistant turns to train on: every turn of a conversation, or only the last one."""

    every_turn = "every_turn"
    last_turn = "last_turn"


class ReasoningEffort(Enum):
    """Values of the `Reasoning:` line of the Harmony system message."""

    low = "low"
    medium = "medium"
    high = "high"


class RenderingForm(Enum):
    """Who writes the tokens of a conversation: openai-harmony's rules, or the tokenizer's chat template."""

    harmony = "harmony"
    template = "template"


@dataclass
class ColumnsConfig:
    """Columns of a data set. A dotted path names a field of a nested object. null: the data set has no such column."""

    messages: Optional[str] = "messages"
    """Column with the list of messages. Use null if the data set has prompt and completion instead."""
    prompt: Optional[str] = None
    """Column with the text of a single user turn."""
    input: Optional[str] = None
    """Column with more of the prompt, as in Alpaca's rows. Its text follows the prompt after a blank line."""
    completion: Optional[str] = None
    """Column with the answer to the prompt."""
    reasoning: Optional[str] = None
    """Column with the reasoning that precedes the completion."""
    system: Optional[str] = "system"
    """Column with instructions to put before the first message. null: such a column is not used."""
    tools: Optional[str] = "tools"
    """Column with the functions that the model can call: a list of schemas, or JSON text of such a list."""
    reasoning_effort: Optional[str] = "reasoning_effort"
    """Column that overrides data.reasoning_effort for its row."""
    reasoning_language: Optional[str] = "reasoning_language"
    """Column that overrides data.reasoning_language for its row."""
    role: str = "role"
    """Name of the message field that holds the author's role."""
    content: str = "content"
    """Name of the message field that holds the text."""
    thinking: str = "thinking"
    """Name of the field that holds an assistant message's reasoning."""


@dataclass(kw_only=True)
class DataPartConfig:
    """A data set beside or inside `data`. A setting that is null has the value of the same setting in `data`."""

    revision: Optional[str] = None
    """As data.revision. null: data.revision if the path is data.path, else the newest revision."""
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
class BlendPartConfig(DataPartConfig):
    """One data set of a blend. A setting that is null has the value of the same setting in `data`."""

    path: str = MISSING
    """As data.path."""
    weight: Annotated[float, POSITIVE] = MISSING
    """Relative share of the rows. Two parts with weights 3 and 1 get 75 % and 25 % of the rows."""


@dataclass
class ValidationConfig(DataPartConfig):
    """Validation rows of your own. If path or split is set, no rows of `data` are held out."""

    path: Optional[str] = None
    """Data set to validate on, given as in data.path; null: data.path, if data.validation.split is set."""
    split: Optional[str] = None
    """Split of the validation rows; null: data.split."""

    @property
    def is_set(self) -> bool:
        """Whether the validation rows are a data set of their own."""
        return self.path is not None or self.split is not None


@dataclass
class DataConfig:
    """The conversations for training and validation."""

    path: Optional[str] = None
    """A .jsonl, .json, .csv, .tsv or .parquet file, a folder, a saved data set, a hub id, or a name like synthetic://demo."""
    revision: Optional[str] = None
    """Revision of a hub id: a branch, tag or commit."""
    split: str = "train"
    """Split of a data set on the Hub, of a saved DatasetDict, or of a folder whose files name splits."""
    streaming: bool = False
    """Read a Hub data set without storing its files. The checked rows are still stored in <run_dir>/data."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    roles: dict[str, str] = field(default_factory=dict)
    """Map from the data set's role names to the standard names: {human: user, gpt: assistant}."""
    filter: dict[str, list[Any]] = field(default_factory=dict)
    """Keep only rows that match in every named column. {category: [a, b]} keeps rows whose category is a or b."""
    blend: list[BlendPartConfig] = field(default_factory=list)
    """Several data sets with weights, instead of data.path: [{path: a.jsonl, weight: 3}, …]."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    max_samples: Annotated[Optional[int], POSITIVE] = None
    """Use only this many rows, drawn with data.seed; null: all. Rows of data.validation are not counted."""
    validation_fraction: Annotated[float, BETWEEN_0_AND_1] = 0.1
    """Share of the rows to hold out for validation, unless data.validation is set. Equal prompts stay together."""
    seed: Annotated[int, SEED] = 42
    """Random seed for data.max_samples and for the split into training and validation rows."""
    max_length: Annotated[int, POSITIVE] = 4096
    """Largest length of a training example in tokens. Longer examples are truncated at the end, and counted."""
    supervise: Supervise = Supervise.every_turn
    """Assistant turns to train on: every_turn or last_turn. Each one is an example, prompted as at inference."""
    rendering: RenderingForm = RenderingForm.harmony
    """harmony: the tokens of openai-harmony, as in vLLM (0.17 or newer); template: those of the chat template."""
    reasoning_effort: ReasoningEffort = ReasoningEffort.medium
    """Value of the system message's `Reasoning:` line. A row can override it (data.columns.reasoning_effort)."""
    reasoning_language: Optional[str] = None
    """Language in the line "reasoning language: …" before the instructions; null: no line. A row can override it."""
    model_identity: Optional[str] = None
    """First line of the system message; null: the usual line ("You are ChatGPT, …"), as chat APIs write it."""
    conversation_date: str = "2025-08-05"
    """Date in the system message's `Current date:` line. It is fixed, so that runs can be reproduced."""
