"""ZeRO's checkpoints for any number of processes, by DeepSpeed's universal checkpoints.

DeepSpeed cuts its files by process, and reads them with as many processes as wrote them. Its own tool, ds_to_universal,
makes whole tensors of them, one file each, which any number reads (https://www.deepspeed.ai/tutorials/universal-checkpointing).
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.shards import raise_if_disk_too_small
from pipeline.tracking import is_main_process, process_count, say, wait_for_everyone

_NATIVE, _UNIVERSAL = "latest", "latest_universal"
"""Files in a checkpoint: which folder of it holds which kind."""

_CONVERTER = "deepspeed.checkpoint.ds_to_universal"
_COPIES = 2  # the tool cuts tensors out of the processes' files before it puts them together


@contextmanager
def read_where_needed() -> Iterator[None]:
    """Inside, DeepSpeed reads checkpoints of another number of processes, too, by converting them first.

    The engine's configuration says once for all checkpoints of which kind they are, but one run may go on from a
    converted one and go back to the best weights in one of its own, or the other way round. There is no public hook
    before an engine reads (DeepSpeed 0.19), so its method is wrapped.

    DeepSpeed 0.19.8 makes two mistakes when it reads converted files for ZeRO-3, which are put right here: all groups of
    parameters get the settings of the first one, so that weights that are not to decay would; and they share one tensor
    that counts Adam's steps, so that each step counts as many times as there are groups.
    """
    from deepspeed import DeepSpeedEngine

    read = DeepSpeedEngine.load_checkpoint

    def read_either(engine: Any, load_dir: str, *others: Any, **more: Any) -> Any:
        engine._config.load_universal_checkpoint = is_universal = _written_by(Path(load_dir)) != process_count()
        if is_universal:
            _have_converted(Path(load_dir))
        own = _settings_of_their_own(engine.optimizer.param_groups)
        result = read(engine, load_dir, *others, **more)
        for group, settings in zip(engine.optimizer.param_groups, own, strict=True):
            group.update(settings)
        for state in engine.optimizer.state.values():
            state["step"] = deepcopy(state["step"])
        return result

    DeepSpeedEngine.load_checkpoint = read_either
    try:
        yield
    finally:
        DeepSpeedEngine.load_checkpoint = read


def _settings_of_their_own(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of an optimizer's groups of parameters: the settings that are not the same in all of them."""
    names = [name for name in groups[0] if name != "params" and any(each[name] != groups[0][name] for each in groups)]
    return [{name: group[name] for name in names} for group in groups]


def _written_by(checkpoint: Path) -> int:
    """How many processes wrote it: each has a file with its part of the optimizer."""
    return len(list(_native(checkpoint).glob("*_optim_states.pt")))


def _native(checkpoint: Path) -> Path:
    return checkpoint / (checkpoint / _NATIVE).read_text(encoding="utf-8").strip()


def _have_converted(checkpoint: Path) -> None:
    if is_main_process() and not (checkpoint / _UNIVERSAL).is_file():
        _convert(checkpoint)
    wait_for_everyone()


def _convert(checkpoint: Path) -> None:
    """Put the universal files beside the others.

    Raises:
        UserError: the disk has too little room, or DeepSpeed cannot convert it.
    """
    native = _native(checkpoint)
    universal = native.with_name(f"{native.name}_universal")
    shutil.rmtree(universal, ignore_errors=True)  # of an interrupted conversion
    raise_if_disk_too_small(checkpoint, _COPIES * sum(path.stat().st_size for path in native.iterdir()))
    say("resume", f"{checkpoint.name}: {_written_by(checkpoint)} processes wrote it; converting it for any number")
    folders = [f"--input_folder={native}", f"--output_folder={universal}"]
    # One file at a time: each holds a process's part of the optimizer. The state that is missing is of pipelines.
    command = [
        sys.executable,
        "-m",
        _CONVERTER,
        "--inject_missing_state",
        *folders,
        "--num_extract_workers=1",
        "--num_merge_workers=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"{checkpoint}: {_written_by(checkpoint)} processes wrote it, and DeepSpeed cannot convert it for"
            f" {process_count()} ({reason}). Go on with as many as before, or start anew with overwrite=true."
        )
