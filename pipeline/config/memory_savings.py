"""Changes of a training stage's settings that save memory. `doctor` advises them before a run, and a run that fails.

A change is a dictionary: key within the section of the stage -> new value. It is empty if the run has that value.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.config.training import TrainConfig

SHORTEST = 512
"""Smallest `data.max_length` that is advised, in tokens. Most examples would be truncated at a smaller one."""


def use_small_batch(train: TrainConfig) -> dict[str, Any]:
    """Run the same number of examples per step, one at a time."""
    steps = train.batch_size * train.gradient_accumulation_steps
    return {"batch_size": 1, "gradient_accumulation_steps": steps} if train.batch_size > 1 else {}


def checkpoint_gradients(train: TrainConfig) -> dict[str, Any]:
    """Compute activations again in the backward pass."""
    return {} if train.gradient_checkpointing else {"gradient_checkpointing": True}


def reshard_after_forward(train: TrainConfig) -> dict[str, Any]:
    """Gather parameters again in the backward pass."""
    return {} if train.reshard_after_forward else {"reshard_after_forward": True}


def write_overrides(stage: str, change: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a change as words of the command line."""
    return tuple(f"{stage}.{key}={_write(value)}" for key, value in change.items())


def write_group(stage: str, group: str) -> str:
    """Return the word of the command line that chooses a file of `conf/train` for a stage."""
    return f"train@{stage}={group}"


def _write(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"
