"""Names of the checkpoints from which training resumes."""

import re
from pathlib import Path

_NAME = re.compile(r"checkpoint-[0-9]+")


def list_checkpoints(directory: Path) -> list[Path]:
    """List the checkpoints in a directory by step. Other names, such as those of the user's copies, are left out."""
    return sorted((path for path in directory.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=read_step)


def read_step(checkpoint: Path) -> int:
    """Return the number of the step after which a checkpoint was written.

    The number is part of the checkpoint's name.
    """
    return int(checkpoint.name.rpartition("-")[2])
