"""Checkpoints for serving: one file per target, one row in EXPORTERS."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.export import mxfp4
from pipeline.models import Weights
from pipeline.source import Source

EXPORTERS: dict[str, Callable[[Weights, Source, Path, int], dict[str, Any]]] = {"mxfp4": mxfp4.write}
"""Target -> writer(weights, source, directory, shard_bytes), which returns figures for artifact.json."""
