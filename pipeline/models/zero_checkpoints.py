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
from pipeline.runs.console import say
from pipeline.runs.disk import raise_if_disk_too_small
from pipeline.runs.processes import is_main_process, process_count, wait_for_everyone

_NATIVE, _UNIVERSAL = "latest", "latest_universal"
"""Files in a checkpoint: which folder of it holds which kind."""

_CONVERTER = "deepspeed.checkpoint.ds_to_universal"
_OPTIONS = (
    "--inject_missing_state",  # which only checkpoints of pipelines have
    "--num_extract_workers=1",  # each holds one process's part of the optimizer
    "--num_merge_workers=1",
)
_COPIES = 2  # the tool cuts tensors out of the processes' files before it puts them together


@contextmanager
def read_where_needed() -> Iterator[None]:
    """Inside, DeepSpeed reads checkpoints of another number of processes, too, by converting them first.

    The engine's configuration says once for all checkpoints of which kind they are, but one run may go on from a
    converted one and go back to the best weights in one of its own, or the other way round. There is no public hook
    before an engine reads (DeepSpeed 0.19), so its method is wrapped.
    """
    from deepspeed import DeepSpeedEngine

    read = DeepSpeedEngine.load_checkpoint

    def read_either(engine: Any, load_dir: str, *others: Any, **more: Any) -> Any:
        is_universal = _written_by(Path(load_dir)) != process_count()
        engine._config.load_universal_checkpoint = is_universal
        if not is_universal:
            return read(engine, load_dir, *others, **more)
        _have_converted(Path(load_dir))
        with _put_right(engine.optimizer):
            return read(engine, load_dir, *others, **more)

    DeepSpeedEngine.load_checkpoint = read_either
    try:
        yield
    finally:
        DeepSpeedEngine.load_checkpoint = read


@contextmanager
def _put_right(optimizer: Any) -> Iterator[None]:
    """Mend what DeepSpeed 0.19.8 gets wrong when it reads converted files for ZeRO-3.

    All groups of parameters get the settings of the first one, so that weights that are not to decay would. They also
    share one tensor that counts Adam's steps, so that each step counts as many times as there are groups.
    """
    own = _settings_of_their_own(optimizer.param_groups)
    yield
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
    for state in optimizer.state.values():
        state["step"] = deepcopy(state["step"])


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
    command = [sys.executable, "-m", _CONVERTER, *folders, *_OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"{checkpoint}: {_written_by(checkpoint)} processes wrote it, and DeepSpeed cannot convert it for"
            f" {process_count()} ({reason}). Go on with as many as before, or start anew with overwrite=true."
        )
