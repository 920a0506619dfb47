"""Check the free space on a disk before the first byte is written."""

import shutil
from pathlib import Path

from pipeline.errors import UserError


def raise_if_disk_too_small(directory: Path, needed: int) -> None:
    """Raise UserError if the disk of `directory` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{directory}: needs {gigabytes(needed)}, but the disk has {gigabytes(free)} free."
            " Free some, or set run_dir to another disk."
        )


def gigabytes(size: float) -> str:
    """Format a number of bytes in decimal units, as for disks: `13.8 GB`, or MB below one GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
