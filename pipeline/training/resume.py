"""Find the checkpoint from which interrupted training resumes, and check that this run can read it.

A run can resume with any number of processes, and each optimizer step uses the same examples as before. The order of
the examples depends only on the seed and the epoch. A resume may change the factors of the global batch, but not their
product (see `by_global_batch`). Nothing else in training is random: neither gpt-oss nor its adapters have dropout.
transformers saves the state of the random generators for each process. An additional process does not need one.
"""

import shutil
from pathlib import Path
from typing import Any

from pipeline.config import Sharding
from pipeline.errors import CheckFailed, UserError
from pipeline.runs.artifacts import SAMPLES_FILE, WHOLE_FILE, digests_of
from pipeline.runs.console import say, warn
from pipeline.runs.durable import replacing, sync, sync_names, sync_tree
from pipeline.runs.json_files import read_record, seal, write_json
from pipeline.runs.metrics import METRICS_FILE, forget_metrics_after, read_lines, read_metrics
from pipeline.runs.processes import is_main_process, process_count, wait_for_everyone
from pipeline.runs.settings import Settings
from pipeline.runs.training_checkpoints import list_checkpoints, read_step

_TRAINER_STATE = "trainer_state.json"  # the name that transformers gives it; importing transformers takes seconds
_RECORDS = (METRICS_FILE, SAMPLES_FILE)
"""Files of the stage to which training adds lines. A checkpoint has copies of them."""


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


def mark_complete(checkpoint: Path, sharding: Sharding) -> None:
    """Record that a checkpoint is complete, how it is sharded, and the size and digest of each file.

    All files are on the disk before the record is written. Among them are copies of the lines of metrics and samples up
    to this step, because a resumed training does not make these lines again. `checkpoint` is in a directory of the
    stage's directory.
    """
    for name in _RECORDS:
        lines = checkpoint.parents[1] / name
        if lines.is_file():
            sync(lines)
            (checkpoint / name).write_bytes(lines.read_bytes())
    sync_tree(checkpoint)
    write_json(checkpoint / WHOLE_FILE, seal({"sharding": sharding.name, "files": digests_of(checkpoint)}))
    sync_names(checkpoint, checkpoint.parents[1])


def restore_records(directory: Path, stage: str, checkpoint: Path | None) -> None:
    """Give metrics.jsonl and samples.jsonl the contents that they had when a checkpoint was written.

    Lines of later steps are removed, because a resumed training writes them again. Lines that are lost or damaged come
    back, with a warning.

    Args:
        directory: directory of the stage.
        stage: name of the stage, for messages.
        checkpoint: the checkpoint from which training resumes, or None if it starts at the beginning.
    """
    if not is_main_process():
        return
    if checkpoint is not None and not _recorded_files(checkpoint).keys() & set(_RECORDS):
        forget_metrics_after(directory, read_step(checkpoint))  # written by an older version, without copies
        return
    for name in _RECORDS:
        _restore(directory / name, stage, None if checkpoint is None else checkpoint / name)


def _restore(path: Path, stage: str, copy: Path | None) -> None:
    if copy is None or not copy.is_file():
        path.unlink(missing_ok=True)
        return
    now, kept = path.read_bytes() if path.is_file() else b"", copy.read_bytes()
    if not now.startswith(kept):
        step = read_step(copy.parent)
        warn(stage, f"{path}: lines up to step {step} are missing or damaged. They are restored from {copy.parent}.")
    if now != kept:
        with replacing(path) as temporary:
            temporary.write_bytes(kept)


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
    found = list_checkpoints(directory)
    if not found:
        return None
    _raise_if_sharded_otherwise(found[-1], sharding)
    return found[-1]


def _remove_unusable(directory: Path, stage: str) -> None:
    """Remove the checkpoints from which training cannot resume.

    A checkpoint also needs the checkpoint with the best weights so far, which may be an earlier one.
    """
    usable: list[int] = []
    for path in list_checkpoints(directory):
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
        recorded = _recorded_files(checkpoint)
    except (ValueError, KeyError):
        return f"{WHOLE_FILE} is not readable"
    missing = [name for name in recorded if not (checkpoint / name).is_file()]
    if missing:
        return f"{', '.join(missing)} missing"
    found = digests_of(checkpoint) if recorded else {}
    changed = [name for name in recorded if found.get(name) != recorded[name]]
    if changed:
        return f"{', '.join(changed)} changed after the checkpoint was written"
    try:
        _read_state(checkpoint)
    except (ValueError, KeyError):
        return f"{_TRAINER_STATE} is not readable"
    return None if METRICS_FILE in recorded else _find_lost_lines(checkpoint)


def _recorded_files(checkpoint: Path) -> dict[str, Any]:
    marker = read_record(checkpoint / WHOLE_FILE)
    files, _ = marker.get("files", {}), marker["sharding"]
    if not isinstance(files, dict):
        raise ValueError("files is not an object")
    return files


def _find_lost_lines(checkpoint: Path) -> str | None:
    """Describe lines of metrics and samples that are lost or damaged, or return None.

    Checkpoints of older versions have no copies of these lines. But they have the trainer's log.
    """
    try:
        lines, _ = read_metrics(checkpoint.parents[1]), read_lines(checkpoint.parents[1] / SAMPLES_FILE)
    except CheckFailed as error:
        return str(error).partition(": it is not")[0]
    lost = _logged(_read_state(checkpoint).get("log_history", [])) - _logged(lines)
    steps = ", ".join(str(step) for step, _ in sorted(lost)[:3])
    return f"{METRICS_FILE} lacks lines up to its step, such as those of step {steps}" if lost else None


def _logged(lines: list[dict[str, Any]]) -> set[tuple[int, str]]:
    return {(line["step"], name) for line in lines for name in ("loss", "eval_loss") if name in line and "step" in line}


def _read_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / _TRAINER_STATE
    state = read_record(path) if path.is_file() else {"best_global_step": None}
    _ = state["best_global_step"]
    return state


def _best_step(checkpoint: Path) -> int | None:
    """Return the step with the lowest validation loss so far, or None if training does not keep the best weights."""
    return _read_state(checkpoint)["best_global_step"]


def _raise_if_sharded_otherwise(checkpoint: Path, sharding: Sharding) -> None:
    before = read_record(checkpoint / WHOLE_FILE)["sharding"]
    if before != sharding.name:
        raise UserError(
            f"{checkpoint}: was written with sharding={before} and cannot be read with sharding={sharding.name}."
            f" Use sharding={before}, or delete {checkpoint.parent} to start again."
        )
