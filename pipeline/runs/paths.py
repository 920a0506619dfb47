"""Paths as settings give them."""

from pathlib import Path


def absolute(path: str | Path) -> Path:
    """Return the absolute path. A leading `~` is the home directory. Links are not followed."""
    return Path(path).expanduser().absolute()
