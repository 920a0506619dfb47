"""The memory that this process may still use on its machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import MachineError
from pipeline.runs.disk import distinct_gigabytes

PROGRAM_BYTES = 1_200_000_000
"""Host memory that a training process takes beside its tensors: Python, torch and the other libraries.

`scripts/demo_full_shape --shape tiny` measures it: training a model of 1 MB on a CPU takes 1.16 GB.
"""
_KEPT_PERCENT = 30
"""Memory that a process keeps on a CPU, in percent of its tensors' peak, because glibc cannot reuse all freed blocks.

The runs of docs/full_shape.md kept 11 to 25 %.
"""


class _Files(NamedTuple):
    """Names of a control group's files, and the name of an entry in memory.stat.

    The entry counts cached file pages. The kernel can drop these pages.
    """

    limit: str
    usage: str
    cached: str


_VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")
_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def training_bytes(tensor_bytes: int) -> int:
    """Return the bytes of host memory that a process needs to train on a CPU.

    Args:
        tensor_bytes: peak of the bytes of its tensors.
    """
    return PROGRAM_BYTES + tensor_bytes + tensor_bytes * _KEPT_PERCENT // 100


def available_bytes() -> int:
    """Return the bytes that are free on this machine, or less if the container or the job has a limit."""
    import psutil

    groups = groups_of(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return min([psutil.virtual_memory().available, *limits(groups)])


def groups_of(listing: Path, mounted: Path) -> list[Path]:
    """List the directories of a process's control groups and of all their parent groups.

    Args:
        listing: /proc/<pid>/cgroup. Each line is `number:controllers:path`. Controllers are empty in version 2.
        mounted: directory where Linux shows the control groups.
    """
    found: list[Path] = []
    for line in listing.read_text().splitlines() if listing.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = mounted / controllers
            inner = root / path.strip("/")
            found += [inner, *(parent for parent in inner.parents if parent.is_relative_to(root))]
    return found


def limits(groups: list[Path]) -> Iterator[int]:
    """Yield the bytes that each control group may still use under its limit. Slurm and Kubernetes set such limits."""
    for group in groups:
        for files in (_VERSION_2, _VERSION_1):
            limit, usage = group / files.limit, group / files.usage
            if limit.is_file() and usage.is_file() and (text := limit.read_text().strip()) != "max":
                cached = _statistic(group / "memory.stat", files.cached)
                yield max(0, int(text) - int(usage.read_text()) + cached)


def _statistic(path: Path, name: str) -> int:
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)


def raise_if_too_small(stage: str, needed: int, what: str, available: int | None = None) -> None:
    """Raise MachineError if this machine has less memory free than a stage needs.

    Args:
        stage: name of the stage, for the message.
        needed: bytes that the processes on this machine need together.
        what: the user of the memory, for the message.
        available: bytes that are free. None: measure them.
    """
    free = available_bytes() if available is None else available
    if free < needed:
        wanted, there = distinct_gigabytes(needed, free)
        raise MachineError(
            f"stage={stage}: {what} needs {wanted} of host memory, but only {there} are free."
            " Free some, raise the memory limit of the container or job, or use a machine with more."
        )
