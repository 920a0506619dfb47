"""Settings of `export` and `publish`: the checkpoint for serving, and its upload to the Hub."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Optional

from pipeline.config.bounds import POSITIVE
from pipeline.config.choices import add_members
from pipeline.config.targets import TARGETS


class ExportTarget(Enum):
    """Layouts that `export` writes: the rows of TARGETS."""

    add_members(vars(), TARGETS)


DEFAULT_TARGET = ExportTarget["mxfp4"]
"""Layout that `export` and `all` write if export.target is null."""


@dataclass
class CardConfig:
    """Facts for the model card. The pipeline cannot take them from the run."""

    base_model: Optional[str] = None
    """Hub id of the base model, for the card; null: model.path, if that is a hub id."""
    license: Optional[str] = None
    """Licence for the card, by its name on the Hub (apache-2.0, …); null: the licence on the base model's card."""


@dataclass
class ExportConfig:
    """Write a checkpoint for serving; `publish` uploads it to the Hub after `verify`."""

    source: Optional[str] = None
    """Model to export: a stage (upcast, sft, quantize, qat), controls/… or a directory; null: the newest stage."""
    target: Optional[ExportTarget] = None
    """Layout: mxfp4 (as the original), openai, nvfp4, gguf (llama.cpp) or bf16; null: mxfp4, or the last target."""
    requantize: bool = False
    """Allow an export in a format for which the model was not trained. The loss of accuracy is reported."""
    shard_bytes: Annotated[int, POSITIVE] = 5_000_000_000
    """Largest size of one weight file, in bytes."""
    push_to_hub: Optional[str] = None
    """Hub repository (name/model) for the verified export. If set, stage=publish and stage=all upload the export."""
    private: bool = True
    """Make a new repository private, and refuse to upload to a public one; false: make a new repository public."""
    card: CardConfig = field(default_factory=CardConfig)

    @property
    def layout(self) -> ExportTarget:
        """The layout that `export` writes."""
        return self.target or DEFAULT_TARGET
