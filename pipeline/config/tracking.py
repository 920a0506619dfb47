"""Settings of `tracking`: the tracker that also gets the metrics of metrics.jsonl."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Optional


class TrackingBackend(Enum):
    """Trackers that get the metrics."""

    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"
    mlflow = "mlflow"


class Upload(Enum):
    """How much a tracker gets in addition to metrics, settings and fingerprints. Each value includes the earlier ones.

    No value uploads the data set.
    """

    none = "none"
    report = "report"
    models = "models"


@dataclass
class TrackingConfig:
    """Where metrics go in addition to metrics.jsonl, which is always written."""

    backend: TrackingBackend = TrackingBackend.none
    """Tracker: wandb (Weights & Biases; WANDB_MODE=offline stores files), tensorboard or mlflow (files in run_dir)."""
    project: str = "gpt-oss-qat"
    """Name of the project at W&B, or of the experiment in MLflow."""
    entity: Optional[str] = None
    """Name of the user or team at W&B; null: the default of the account that is logged in."""
    tags: list[str] = field(default_factory=list)
    """Tags of every stage, in addition to the recipe, the model and the format."""
    name: Optional[str] = None
    """Name of the run in the tracker; null: the recipe. Each stage is a run in its group: <name>-<stage>[-<target>]."""
    upload: Upload = Upload.report
    """What the tracker gets besides metrics: none, report (plots, tables, sample answers) or models (also weights)."""


def problems(tracking: TrackingConfig) -> Iterator[str]:
    """Yield a message for each combination of settings that no tracker can fulfil."""
    if tracking.backend is TrackingBackend.tensorboard and tracking.upload is Upload.models:
        yield "tracking.upload=models: TensorBoard stores no weights. Use tracking.upload=report, or tracking=mlflow."
