"""Checkpoints for serving: one file per target, one row in EXPORTERS."""

from collections.abc import Callable
from pathlib import Path

from pipeline.export import mxfp4
from pipeline.export.target import Exported, Job

EXPORTERS: dict[str, Callable[[Job, Path], Exported]] = {"mxfp4": mxfp4.write}
"""Target -> writer(job, directory)."""
