"""Read and write metrics.jsonl. A stage appends one JSON object per line while it runs, and reports read them."""

import json
from pathlib import Path
from typing import Any

from pipeline.errors import CheckFailed
from pipeline.runs.durable import write_text
from pipeline.runs.processes import is_main_process

METRICS_FILE = "metrics.jsonl"


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Read a stage's metrics.jsonl. See `read_lines`."""
    return read_lines(directory / METRICS_FILE)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line. If a crash has truncated the last line, that line is left out.

    Raises:
        CheckFailed: a line is damaged.
    """
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    return [_read_line(path, number, line) for number, line in enumerate(whole.split(b"\n")[:-1], 1)]


def _read_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise CheckFailed(
            f"{path}: line {number} is damaged: it is not a JSON object. Restore the file from a copy, or run its stage"
            " again with overwrite=true."
        )
    return read


def forget_metrics_after(directory: Path, step: int) -> None:
    """Delete the lines of all steps that a resumed run repeats."""
    path = directory / METRICS_FILE
    if is_main_process() and path.is_file():
        kept = [line for line in read_metrics(directory) if line.get("step", 0) <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
