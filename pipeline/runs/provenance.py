"""Describe the program, the libraries and the machine that made a result, for artifact.json."""

import platform
import resource
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline import __version__
from pipeline.runs.processes import process_count

_LIBRARIES = ("torch", "transformers", "trl", "peft", "nvidia-modelopt", "accelerate", "datasets", "safetensors")
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # Unit of getrusage(2): bytes on macOS, KiB on Linux.


def record() -> dict[str, object]:
    """Return the program's version and commit, the versions of libraries, the machine, and this process's peak memory.

    The peak of GPU memory counts this stage only. Linux keeps one peak of host memory for the life of a process, so the
    host peak includes the earlier stages of `stage=all`.
    """
    import torch

    cuda = torch.cuda.is_available()
    return {
        "program": __version__,
        "git_commit": _git_commit(),
        "libraries": dict(_libraries()),
        "host": platform.node(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "processes": process_count(),
        "peak_memory_bytes": peak_resident_bytes(),
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
    }


def versions() -> str:
    """Return the versions of the program, of the main libraries and of Python, in three lines. Nothing is imported."""
    commit = _git_commit()
    libraries = ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES)
    return "\n".join(
        [
            f"gpt-oss-qat {__version__}" + (f", commit {commit}" if commit else ""),
            libraries,
            f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        ]
    )


@cache
def _libraries() -> dict[str, str]:
    return {name: version(name) for name in _LIBRARIES}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "is not installed"


def peak_resident_bytes() -> int:
    """Return the peak of this process's host memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


@cache
def _git_commit() -> str | None:
    """Return the program's commit, or None outside a checkout. '+changes' is appended if tracked files are edited.

    A process asks git once, because it does not load code that changes later.
    """
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists() or shutil.which("git") is None:
        return None
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    changes = subprocess.run(
        ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=False
    )
    return (commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")) or None
