"""Check the free space on a disk before the first byte is written."""

import shutil
from pathlib import Path

from pipeline.errors import UserError


def raise_if_disk_too_small(directory: Path, needed: int) -> None:
    """Raise UserError if the disk of `directory` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        wanted, there = distinct_gigabytes(needed, free)
        raise UserError(
            f"{directory}: needs {wanted}, but the disk has {there} free. Free some, or set run_dir to another disk."
        )


def gigabytes(size: float, digits: int = 1) -> str:
    """Format a number of bytes in decimal units, as for disks: `13.8 GB`, or MB below one GB."""
    return f"{size / 1e9:.{digits}f} GB" if size >= 1e9 else f"{size / 1e6:.{digits}f} MB"


def distinct_gigabytes(first: float, second: float) -> tuple[str, str]:
    """Format two different sizes as `gigabytes` does, with as many digits as they need to look different."""
    digits = next((n for n in range(1, 9) if gigabytes(first, n) != gigabytes(second, n)), 9)
    return gigabytes(first, digits), gigabytes(second, digits)
