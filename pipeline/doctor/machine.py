"""Measure the free disk space, host memory and GPU memory of this machine."""

import shutil
from pathlib import Path

import psutil
import torch

from pipeline.runs.processes import process_count


def figures(run_dir: Path) -> dict[str, int]:
    """Measure the free bytes on the disk of `run_dir`, in host memory and on the fullest GPU.

    The result also has the numbers of GPUs and processes.
    """
    gpus = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
    return {
        "disk_free_bytes": shutil.disk_usage(_existing(run_dir)).free,
        "host_free_bytes": psutil.virtual_memory().available,
        "gpus": len(gpus),
        "gpu_free_bytes": min((free for free, _ in gpus), default=0),
        "processes": process_count(),
    }


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
