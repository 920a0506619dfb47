"""The rank of this process, the number of processes, and the barrier between them."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")

_PATIENCE = timedelta(days=1)
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_ROOT = Path(__file__).resolve().parents[2]
_RUN_MODULE = """\
import runpy, sys
root, module = sys.argv[1:3]
del sys.argv[1:3]
sys.path = [root, *filter(None, sys.path)]
runpy.run_module(module, run_name="__main__", alter_sys=True)"""


def module_command(module: str, *arguments: str) -> list[str]:
    """Return a command that runs a module in a new process of this Python, as `python -m` does.

    `python -m` would import from the working directory first. There, a file of the user such as pipeline.py could have
    the name of a module that is needed.
    """
    return [sys.executable, "-c", _RUN_MODULE, str(_ROOT), module, *arguments]


def is_main_process() -> bool:
    """Whether this process is the only one, or has rank 0 under `accelerate launch` or `torchrun`."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """Number of processes that `accelerate launch` or `torchrun` started. Without a launcher, it is 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_process_count() -> int:
    """Number of processes on this machine. With one machine, it equals `process_count`."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or process_count())


def has_launcher() -> bool:
    """Whether a launcher gave this process a GPU of its own. Without a launcher, it uses all visible GPUs."""
    return int(os.environ.get("LOCAL_RANK", "-1")) >= 0


def wait_for_everyone() -> None:
    """Wait until all processes have reached this point."""
    if process_count() > 1:
        import torch
        from accelerate import PartialState

        # The first PartialState creates the process group. On a machine without a GPU, it does so only with cpu=True.
        # While the main process converts a model, the others may wait longer than the default timeout of 10 minutes.
        PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE).wait_for_everyone()


def has_lost_another_process(error: Exception) -> bool:
    """Return whether a collective failed because another process has ended. Gloo says so only in its message."""
    return process_count() > 1 and isinstance(error, RuntimeError) and any(end in str(error) for end in _LOST)


def main_process_value(value: Value) -> Value:
    """Return the main process's value, after all processes have reached this point."""
    if process_count() == 1:
        return value
    wait_for_everyone()
    from accelerate.utils import broadcast_object_list

    found: list[Value] = [value]
    broadcast_object_list(found)
    return found[0]


@contextmanager
def all_cores() -> Iterator[None]:
    """Let this process compute on all cores it may use, while the other processes of this machine wait.

    Launchers set OMP_NUM_THREADS to a share of the cores. torchrun sets it to 1. Without a launcher, nothing changes.
    """
    if process_count() == 1:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(_count_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_main_process(act: Callable[[], None]) -> None:
    """Let the main process act while the others wait."""
    wait_for_everyone()
    if is_main_process():
        with all_cores():
            act()
    wait_for_everyone()


def environment_with_all_cores() -> dict[str, str]:
    """Return the environment for a program that computes on all cores while this machine's processes wait for it.

    Otherwise it would inherit the launcher's OMP_NUM_THREADS. Without a launcher, nothing changes.
    """
    if process_count() == 1:
        return dict(os.environ)
    return {**os.environ, "OMP_NUM_THREADS": str(_count_cores())}


def _count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
