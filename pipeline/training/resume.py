"""Find the checkpoint from which interrupted training resumes, and check that this run can read it.

A run can resume with any number of processes, and each optimizer step uses the same examples as before. The order of
the examples depends only on the seed and the epoch. A resume may change the factors of the global batch, but not their
product (see `by_global_batch`). Nothing else in training is random: neither gpt-oss nor its adapters have dropout.
transformers saves the state of the random generators for each process. An additional process does not need one.
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
"""Name of a file that every complete checkpoint has. The file records how the checkpoint is sharded."""


def by_global_batch(settings: Settings) -> Settings:
    """Replace the factors of the global batch by their product, in settings that must not change on a resume.

    The trained model depends on which examples an optimizer step uses. It does not depend on how these are distributed
    over processes and forward passes.
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
    """Return the number of the step after which a checkpoint was written.

    The number is part of the checkpoint's name.
    """
    return int(checkpoint.name.rpartition("-")[2])


def mark_complete(checkpoint: Path, sharding: Sharding) -> None:
    """Record that a checkpoint is complete, and how it is sharded."""
    write_json(checkpoint / MARKER, {"sharding": sharding.name})


def find_last_complete(directory: Path, stage: str, sharding: Sharding) -> Path | None:
    """Remove incomplete checkpoints, and return the newest complete one, or None.

    Args:
        directory: directory with the checkpoints of a stage.
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
