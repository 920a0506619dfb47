"""`tracking`: metrics beyond metrics.jsonl."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional


class TrackingBackend(Enum):
    """Services that get the metrics."""

    none = "none"
    wandb = "wandb"


@dataclass
class TrackingConfig:
    """Metrics beyond metrics.jsonl, which is always written."""

    backend: TrackingBackend = TrackingBackend.none
    """Service that gets the same metrics: none or wandb (Weights & Biases; WANDB_MODE=offline stores them locally)."""
    project: str = "gpt-oss-qat"
    """Project of the service."""
    entity: Optional[str] = None
    """User or team of the service; null: the default of the login."""
    tags: list[str] = field(default_factory=list)
    """Tags of every stage's run."""
    name: Optional[str] = None
    """Name of the pipeline run. Stages appear as <name>-<stage>, in one group. null: the recipe."""
