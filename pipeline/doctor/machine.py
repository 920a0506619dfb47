"""Free disk space, host memory and GPU memory of this machine."""

import shutil
from pathlib import Path

import psutil
import torch

from pipeline.runs.processes import process_count


def figures(run_dir: Path) -> dict[str, int]:
    """Measure free bytes (disk of `run_dir`, host memory, the fullest GPU), and count GPUs and processes."""
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
