"""Checkpoints for serving: one file per target, one row in EXPORTERS."""

from collections.abc import Callable
from pathlib import Path

from pipeline.export import mxfp4
from pipeline.export.target import Job
from pipeline.shards import Written

EXPORTERS: dict[str, Callable[[Job, Path], Written]] = {"mxfp4": mxfp4.write}
"""Target -> writer(job, directory).

Each note of what it returns has `tensors` (names), `is_copied` (whether they are the source's own bytes), and, of
experts, `layer`, `copied_experts` and `sums` of Survival.
"""
