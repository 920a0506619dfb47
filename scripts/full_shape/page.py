"""Writes the table of docs/full_shape.md from the results."""

from pathlib import Path


def write(results: Path) -> None:
    raise NotImplementedError(results)
