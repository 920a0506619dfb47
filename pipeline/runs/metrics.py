"""Read and write metrics.jsonl. A stage appends one JSON object per line while it runs, and reports read them."""

import json
from pathlib import Path
from typing import Any

from pipeline.runs.durable import write_text
from pipeline.runs.processes import is_main_process

METRICS_FILE = "metrics.jsonl"


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Read a stage's metrics.jsonl. If a crash has truncated the last line, that line is left out."""
    path = directory / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def forget_metrics_after(directory: Path, step: int) -> None:
    """Delete the lines of all steps that a resumed run repeats."""
    path = directory / METRICS_FILE
    if is_main_process() and path.is_file():
        kept = [line for line in read_metrics(directory) if line.get("step", 0) <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
