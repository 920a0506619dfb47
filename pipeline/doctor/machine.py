"""Measure the free disk space, host memory and GPU memory of this machine."""

import shutil
from pathlib import Path

from pipeline.config.gpus import GpuModel
from pipeline.runs import gpus, host_memory
from pipeline.runs.gpus import Gpu
from pipeline.runs.processes import local_process_count, process_count


def figures(run_dir: Path, planned: GpuModel | None = None) -> dict[str, int]:
    """Measure the free bytes on the disk of `run_dir`, in host memory and on the fullest GPU.

    The result also has the size of the smallest GPU, the number of GPUs, and the number of processes. The processes of
    this machine are also counted separately, because they share its host memory.

    Args:
        run_dir: directory of the run.
        planned: the GPU to plan for, or None. Then each process has such a GPU, and all its memory is free.
    """
    visible = gpus.visible()
    free = gpus.free_bytes() if visible and planned is None else []
    if planned is not None:
        visible = (Gpu(planned.names[0], planned.capability, planned.memory_bytes),) * local_process_count()
    totals = [gpu.total_bytes for gpu in visible]
    return {
        "disk_free_bytes": shutil.disk_usage(_existing(run_dir)).free,
        "host_free_bytes": host_memory.available_bytes(),
        "gpus": len(visible),
        "gpu_free_bytes": min(free or totals, default=0),
        "gpu_total_bytes": min(totals, default=0),
        "processes": process_count(),
        "local_processes": local_process_count(),
    }


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
