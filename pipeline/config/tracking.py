"""Settings of `tracking`: the service that also gets the metrics of metrics.jsonl."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional


class TrackingBackend(Enum):
    """Services that get the metrics."""

    none = "none"
    wandb = "wandb"


@dataclass
class TrackingConfig:
    """Where metrics go in addition to metrics.jsonl, which is always written."""

    backend: TrackingBackend = TrackingBackend.none
    """Service that gets the same metrics: none or wandb (Weights & Biases; WANDB_MODE=offline stores them locally)."""
    project: str = "gpt-oss-qat"
    """Name of the project in the service."""
    entity: Optional[str] = None
    """Name of the user or team in the service; null: the default of the account that is logged in."""
    tags: list[str] = field(default_factory=list)
    """Tags in the service. Every stage gets the same tags."""
    name: Optional[str] = None
    """Name of the pipeline run in the service; null: the recipe. Each stage is one run in its group: <name>-<stage>."""
