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
from pipeline.runs.artifacts import SAMPLES_FILE, WHOLE_FILE, digests_of
from pipeline.runs.console import say, warn
from pipeline.runs.durable import sync, sync_names, sync_tree
from pipeline.runs.json_files import write_json
from pipeline.runs.metrics import METRICS_FILE
from pipeline.runs.processes import is_main_process, process_count, wait_for_everyone
from pipeline.runs.settings import Settings

_TRAINER_STATE = "trainer_state.json"  # the name that transformers gives it; importing transformers takes seconds


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
    """Record that a checkpoint is complete, how it is sharded, and the size and digest of each file.

    All files are on the disk before the record is written. So are the lines of metrics and samples up to this step,
    because a resumed training does not write them again. `checkpoint` is in a directory of the stage's directory.
    """
    for lines in (checkpoint.parents[1] / METRICS_FILE, checkpoint.parents[1] / SAMPLES_FILE):
        if lines.is_file():
            sync(lines)
    sync_tree(checkpoint)
    write_json(checkpoint / WHOLE_FILE, {"sharding": sharding.name, "files": digests_of(checkpoint)})
    sync_names(checkpoint, checkpoint.parents[1])


def find_last_complete(directory: Path, stage: str, sharding: Sharding) -> Path | None:
    """Remove incomplete and damaged checkpoints, and return the newest whole one, or None.

    Args:
        directory: directory with the checkpoints of a stage.
        stage: name of the stage, for messages.
        sharding: how this run shards the model.

    Raises:
        UserError: the checkpoint was written with another sharding.
    """
    wait_for_everyone()
    if is_main_process():
        _remove_unusable(directory, stage)
    wait_for_everyone()
    found = sorted(directory.glob("checkpoint-*"), key=read_step)
    if not found:
        return None
    _raise_if_sharded_otherwise(found[-1], sharding)
    return found[-1]


def _remove_unusable(directory: Path, stage: str) -> None:
    """Remove the checkpoints from which training cannot resume.

    A checkpoint also needs the checkpoint with the best weights so far, which may be an earlier one.
    """
    usable: list[int] = []
    for path in sorted(directory.glob("checkpoint-*"), key=read_step):
        if not (path / WHOLE_FILE).is_file():
            say(stage, f"removing {path.name}: it is incomplete, because the run was interrupted")
        elif (damage := _find_damage(path)) is not None:
            warn(stage, f"removing {path.name}: {damage}. Training resumes from an earlier checkpoint, if there is one")
        elif (best := _best_step(path)) not in (None, read_step(path), *usable):
            warn(stage, f"removing {path.name}: the best weights before it, checkpoint-{best}, are missing")
        else:
            usable.append(read_step(path))
            continue
        shutil.rmtree(path)


def _find_damage(checkpoint: Path) -> str | None:
    """Describe the damage of a checkpoint's files, or return None. Markers of older versions list no files."""
    try:
        recorded = json.loads((checkpoint / WHOLE_FILE).read_text(encoding="utf-8")).get("files", {})
    except ValueError:
        return f"{WHOLE_FILE} is not readable"
    missing = [name for name in recorded if not (checkpoint / name).is_file()]
    if missing:
        return f"{', '.join(missing)} missing"
    found = digests_of(checkpoint) if recorded else {}
    changed = [name for name in recorded if found[name] != recorded[name]]
    return f"{', '.join(changed)} changed after the checkpoint was written" if changed else None


def _best_step(checkpoint: Path) -> int | None:
    """Return the step with the lowest validation loss so far, or None if training does not keep the best weights."""
    path = checkpoint / _TRAINER_STATE
    return json.loads(path.read_text(encoding="utf-8"))["best_global_step"] if path.is_file() else None


def _raise_if_sharded_otherwise(checkpoint: Path, sharding: Sharding) -> None:
    before = json.loads((checkpoint / WHOLE_FILE).read_text(encoding="utf-8"))["sharding"]
    if before != sharding.name:
        raise UserError(
            f"{checkpoint}: was written with sharding={before} and cannot be read with sharding={sharding.name}."
            f" Use sharding={before}, or delete {checkpoint.parent} to start again."
        )
