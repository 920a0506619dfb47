"""Reads the files that runs leave behind."""

import json
from pathlib import Path
from typing import Any

from pipeline.checkpoints.shards import INDEX
from pipeline.runs import artifacts
from pipeline.runs.artifacts import SHARDS_FILE
from pipeline.runs.metrics import read_metrics


def source_of(run_dir: Path) -> Path:
    """Return the checkpoint that a run has made for itself."""
    (directory,) = (run_dir / "source").iterdir()
    return directory


def losses(run_dir: Path) -> list[float]:
    """Return all losses of the stages that train, in order."""
    lines = [line for stage in ("sft", "qat") for line in read_metrics(run_dir / stage)]
    return [line[key] for line in lines for key in ("loss", "eval_loss") if key in line]


def results(run_dir: Path) -> dict[str, Any]:
    """Return the results of `stage=evaluate`, by model."""
    found: dict[str, Any] = artifacts.load(run_dir / "evaluate").details["results"]
    return found


def read_files(directory: Path) -> dict[str, bytes]:
    """Read all files except the bookkeeping of an unfinished conversion."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != SHARDS_FILE}


def weight_map_of(directory: Path) -> dict[str, str]:
    """Return the index of a checkpoint: tensor -> file."""
    found: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
    return found
