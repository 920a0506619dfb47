"""What this machine has free now: disk, host memory, GPU memory."""

import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.config import PipelineConfig


def figures(config: PipelineConfig) -> dict[str, Any]:
    """Free bytes where run_dir will be, in host memory and on the fullest GPU; processes of this run."""
    gpus = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
    return {
        "disk_free_bytes": shutil.disk_usage(_existing(Path(config.run_dir).expanduser().absolute())).free,
        "host_free_bytes": psutil.virtual_memory().available,
        "gpus": len(gpus),
        "gpu_free_bytes": min((free for free, _ in gpus), default=0),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
