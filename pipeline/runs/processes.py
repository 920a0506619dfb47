"""The rank of this process, the number of processes, and the barrier between them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

_PATIENCE = timedelta(days=1)


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
