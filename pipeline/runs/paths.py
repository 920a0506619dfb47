"""Paths as settings give them."""

import os
from pathlib import Path


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path. A leading `~` is the home directory. Links are not followed."""
    return Path(path).expanduser().absolute()
