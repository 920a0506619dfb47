"""Measure the free disk space, host memory and GPU memory of this machine."""

import shutil
from pathlib import Path

from pipeline.runs import gpus, host_memory
from pipeline.runs.processes import local_process_count, process_count


def figures(run_dir: Path) -> dict[str, int]:
    """Measure the free bytes on the disk of `run_dir`, in host memory and on the fullest GPU.

    The result also has the size of the smallest GPU, the number of GPUs, and the number of processes. The processes of
    this machine are also counted separately, because they share its host memory.
    """
    visible = gpus.visible()
    free = gpus.free_bytes() if visible else []
    return {
        "disk_free_bytes": shutil.disk_usage(_existing(run_dir)).free,
        "host_free_bytes": host_memory.available_bytes(),
        "gpus": len(visible),
        "gpu_free_bytes": min(free, default=0),
        "gpu_total_bytes": min((gpu.total_bytes for gpu in visible), default=0),
        "processes": process_count(),
        "local_processes": local_process_count(),
    }


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
