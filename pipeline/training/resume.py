"""Checkpoints that interrupted training goes on from: which are whole, and whether they can be read.

A checkpoint stands after a number of global batches, and the order of the examples depends on the seed and the epoch
alone: with the same global batch (see `by_global_batch`) any number of processes goes on with the same examples.
Nothing else that training does is random (gpt-oss has no dropout, and adapters have none), so that the states of
random generators, which transformers saves for each process, need not be there for a process that is new.
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

WHOLE = "whole"
"""This file in a checkpoint says that all of it was written, and how it was sharded."""


def by_global_batch(settings: Settings) -> Settings:
    """Settings that training must be resumed with: the global batch takes the place of its factors.

    The examples of an optimizer step matter for the result. How processes and forward passes share them does not.
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


def step_of(checkpoint: Path) -> int:
    """After which step it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def mark_whole(checkpoint: Path, shared: Sharding) -> None:
    """Say that all of it is on disk."""
    write_json(checkpoint / WHOLE, {"sharding": shared.name})


def last_whole(directory: Path, stage: str, shared: Sharding) -> Path | None:
    """The newest checkpoint that was written to its end; later, broken ones are removed.

    Raises:
        UserError: it was sharded otherwise.
    """
    found = sorted(directory.glob("checkpoint-*"), key=step_of)
    whole = [path for path in found if (path / WHOLE).is_file()]
    wait_for_everyone()
    for path in found:
        if path not in whole and is_main_process():
            say(stage, f"removing {path.name}, which was interrupted while it was written")
            shutil.rmtree(path)
    wait_for_everyone()
    if whole:
        _raise_if_made_otherwise(whole[-1], shared)
    return whole[-1] if whole else None


def _raise_if_made_otherwise(checkpoint: Path, shared: Sharding) -> None:
    before = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))["sharding"]
    if before != shared.name:
        raise UserError(
            f"{checkpoint}: was written with sharding={before}; its files cannot be read with sharding={shared.name}."
            " Go on as it was begun, or start anew with overwrite=true."
        )
