"""`export`: the checkpoint for serving, and its place on the Hub."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Optional

from pipeline.config.bounds import POSITIVE
from pipeline.config.choices import add_members
from pipeline.config.targets import TARGETS


class ExportTarget(Enum):
    """Layouts that `export` writes: the rows of TARGETS."""

    add_members(vars(), TARGETS)


@dataclass
class CardConfig:
    """Facts for the model card that the run does not record."""

    base_model: Optional[str] = None
    """Base model on the card, as a hub id; null: model.path, if it is a hub id."""
    license: Optional[str] = None
    """Licence on the card, by its name on the Hub (apache-2.0, …); null: the licence of the base model's card."""


@dataclass
class ExportConfig:
    """Write a checkpoint for serving; `publish` uploads it to the Hub after `verify`."""

    source: Optional[str] = None
    """Model to export: a stage of this run (upcast, sft, quantize, qat) or a directory; null: the run's newest."""
    target: ExportTarget = ExportTarget["mxfp4"]
    """Layout: mxfp4 (as openai/gpt-oss on Hugging Face), openai (OpenAI's own), nvfp4, gguf (llama.cpp) or bf16."""
    requantize: bool = False
    """Round a model to another format than it was trained for. The loss of accuracy is reported."""
    shard_bytes: Annotated[int, POSITIVE] = 5_000_000_000
    """Size limit of one weight file, in bytes."""
    push_to_hub: Optional[str] = None
    """Hub repository (name/model) for the verified export. stage=publish uploads it, also as a part of stage=all."""
    private: bool = True
    """Create the repository as private, and refuse to upload to a public one; false: a public repository."""
    card: CardConfig = field(default_factory=CardConfig)
