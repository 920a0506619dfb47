"""Checkpoints of interrupted training: which are complete, and whether this run can resume from them.

A run can resume with any number of processes, which see the same examples. The order of the examples depends only
on the seed and the epoch, and `by_global_batch` keeps the global batch unchanged. Nothing else in training is random:
neither gpt-oss nor its adapters have dropout. So a new process does not need the random generator states that
transformers saves for each process.
"""

import json
import shutil
from pathlib import Path

from pipeline.config import Sharding
from pipeline.errors import UserError
from pipeline.runs.console import say
from pipeline.runs.json_files import write_json
from pipeline.runs.processes import is_main_process, process_count, wait_for_everyone
from pipeline.runs.settings import Settings

MARKER = "whole"
"""Name of a file in every complete checkpoint. It holds the sharding of the checkpoint."""


def by_global_batch(settings: Settings) -> Settings:
    """Replace the factors of the global batch by their product, for settings that training must be resumed with.

    The result depends on the examples of an optimizer step, not on how processes and forward passes share them.
    """
    found = dict(settings)
    for key in settings:
        section, _, name = key.rpartition(".")
        if name == "gradient_accumulation_steps":
            steps, rows = found.pop(key), found.pop(f"{section}.batch_size")
            assert isinstance(steps, int) and isinstance(rows, int)
            product = steps * rows * process_count()
            found[f"{section}.batch_size x {key} x processes"] = product
    return found


def read_step(checkpoint: Path) -> int:
    """Read from a checkpoint's name the step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def mark_complete(checkpoint: Path, sharding: Sharding) -> None:
    """Record that a checkpoint is complete, and how it is sharded."""
    write_json(checkpoint / MARKER, {"sharding": sharding.name})


def find_last_complete(directory: Path, stage: str, sharding: Sharding) -> Path | None:
    """Find the newest complete checkpoint, after removing incomplete ones.

    Args:
        directory: the checkpoints of a stage.
        stage: name of the stage, for messages.
        sharding: how this run shards the model.

    Raises:
        UserError: the checkpoint was written with another sharding.
    """
    found = sorted(directory.glob("checkpoint-*"), key=read_step)
    complete = [path for path in found if (path / MARKER).is_file()]
    wait_for_everyone()
    if is_main_process():
        _remove([path for path in found if path not in complete], stage)
    wait_for_everyone()
    if not complete:
        return None
    _raise_if_sharded_otherwise(complete[-1], sharding)
    return complete[-1]


def _remove(incomplete: list[Path], stage: str) -> None:
    for path in incomplete:
        say(stage, f"removing {path.name}: it is incomplete, because the run was interrupted")
        shutil.rmtree(path)


def _raise_if_sharded_otherwise(checkpoint: Path, sharding: Sharding) -> None:
    before = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["sharding"]
    if before != sharding.name:
        raise UserError(
            f"{checkpoint}: was written with sharding={before} and cannot be read with sharding={sharding.name}."
            f" Use sharding={before}, or delete {checkpoint.parent} to start again."
        )
