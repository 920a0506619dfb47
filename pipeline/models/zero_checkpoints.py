"""Resume from ZeRO checkpoints that more or fewer processes wrote.

DeepSpeed writes separate files for each process, and only the same number of processes can read them. DeepSpeed's tool
ds_to_universal converts them to a universal checkpoint with one file per tensor. Any number of processes can read these
files (https://www.deepspeed.ai/tutorials/universal-checkpointing).
"""

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.runs.console import say
from pipeline.runs.disk import raise_if_disk_too_small
from pipeline.runs.processes import (
    environment_with_all_cores,
    is_main_process,
    module_command,
    process_count,
    wait_for_everyone,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer

_NATIVE, _UNIVERSAL = "latest", "latest_universal"
"""Two files in a checkpoint. They name the folder with native files and the folder with universal files."""

_CONVERTER = "deepspeed.checkpoint.ds_to_universal"
_OPTIONS = (
    "--inject_missing_state",  # adds state that only checkpoints of pipeline parallelism have
    "--num_extract_workers=1",  # each worker holds the optimizer shard of one process in memory
    "--num_merge_workers=1",
)
_COPIES = 2  # the tool writes all tensors to disk twice: first in fragments, then joined


@contextmanager
def convert_when_needed() -> Iterator[None]:
    """Inside the block, convert checkpoints that more or fewer processes wrote, before DeepSpeed reads them.

    A setting tells DeepSpeed whether checkpoints are universal. DeepSpeed applies it to all checkpoints that it loads.
    But a run may resume from a universal checkpoint and later load its best weights from a native one, or the reverse.
    So this block sets it again before each load. DeepSpeed 0.19 has no public hook for this, so `load_checkpoint` is
    wrapped.
    """
    from deepspeed import DeepSpeedEngine

    read = DeepSpeedEngine.load_checkpoint

    def read_either(engine: Any, load_dir: str, *others: object, **more: object) -> object:
        is_universal = _count_writers(Path(load_dir)) != process_count()
        engine._config.load_universal_checkpoint = is_universal
        if not is_universal:
            return read(engine, load_dir, *others, **more)
        _convert_once(Path(load_dir))
        with _keep_group_settings(engine.optimizer):
            return read(engine, load_dir, *others, **more)

    DeepSpeedEngine.load_checkpoint = read_either
    try:
        yield
    finally:
        DeepSpeedEngine.load_checkpoint = read


@contextmanager
def _keep_group_settings(optimizer: "Optimizer") -> Iterator[None]:
    """Correct two errors of DeepSpeed 0.19.8 after it reads converted files for ZeRO-3.

    - DeepSpeed copies the settings of the first parameter group to all groups, so all weights would get weight decay.
    - It makes all groups share one tensor that counts Adam's steps, so each step would be counted once per group.
    """
    differing = _differing_settings(optimizer.param_groups)
    yield
    for group, settings in zip(optimizer.param_groups, differing, strict=True):
        group.update(settings)
    for state in optimizer.state.values():
        state["step"] = deepcopy(state["step"])


def _differing_settings(groups: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Find the settings that are not the same in all parameter groups. Return their values for each group."""
    names = [name for name in groups[0] if name != "params" and any(each[name] != groups[0][name] for each in groups)]
    return [{name: group[name] for name in names} for group in groups]


def _count_writers(checkpoint: Path) -> int:
    """Count the processes that wrote a checkpoint. Each process wrote one file with its optimizer shard."""
    return len(list(_native_folder(checkpoint).glob("*_optim_states.pt")))


def _native_folder(checkpoint: Path) -> Path:
    return checkpoint / (checkpoint / _NATIVE).read_text(encoding="utf-8").strip()


def _convert_once(checkpoint: Path) -> None:
    if is_main_process() and not (checkpoint / _UNIVERSAL).is_file():
        _convert(checkpoint)
    wait_for_everyone()


def _convert(checkpoint: Path) -> None:
    """Write universal files beside the native ones.

    Raises:
        UserError: the disk has too little space, or DeepSpeed cannot convert the checkpoint.
    """
    native = _native_folder(checkpoint)
    universal = native.with_name(f"{native.name}_universal")
    shutil.rmtree(universal, ignore_errors=True)  # left by an interrupted conversion
    raise_if_disk_too_small(checkpoint, _COPIES * sum(path.stat().st_size for path in native.iterdir()))
    say("resume", f"{checkpoint.name}: was written by {_count_writers(checkpoint)} processes; converting it")
    folders = [f"--input_folder={native}", f"--output_folder={universal}"]
    command = module_command(_CONVERTER, *folders, *_OPTIONS)
    environment = environment_with_all_cores()  # the other processes wait
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"{checkpoint}: was written by {_count_writers(checkpoint)} processes, and DeepSpeed cannot convert it for"
            f" {process_count()} ({reason}). Resume with as many processes as before, or delete"
            f" {checkpoint.parent} to start again."
        )
