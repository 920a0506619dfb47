"""What a run tells: lines for a person, progress, and metrics.jsonl. Only the main process speaks and writes."""

import json
import os
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"

_PATIENCE = timedelta(days=1)


def is_main_process() -> bool:
    """Whether this process is the only one, or the first that `accelerate launch` or `torchrun` started."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_everyone() -> None:
    """Let all processes come to this point before any goes on."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch
        from accelerate import PartialState

        # The first PartialState makes the process group. Without cpu=True it makes none on a machine without a GPU; the
        # default timeout (10 minutes on GPUs) is shorter than the main process may be busy converting a model.
        PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE).wait_for_everyone()


def say(stage: str, message: str) -> None:
    """A line for the person at the terminal."""
    if is_main_process():
        print(f"[{stage}] {message}", flush=True)


def warn(stage: str, message: str) -> None:
    """A line that the person must not miss."""
    if is_main_process():
        print(f"[{stage}] warning: {message}", file=sys.stderr, flush=True)


def log_metrics(directory: Path, values: dict[str, Any]) -> None:
    """Append one JSON object to the stage's metrics.jsonl."""
    if is_main_process():
        with (directory / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **values}) + "\n")


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.jsonl; a last line that was cut off by a crash is left out."""
    path = directory / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def forget_metrics_after(directory: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run is about to repeat."""
    path = directory / METRICS_FILE
    if is_main_process() and path.is_file():
        kept = [line for line in read_metrics(directory) if line.get("step", 0) <= step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def progress(items: Iterable | None = None, total: int | None = None, what: str = "", unit: str = "it") -> Any:
    """A progress bar on the terminal; silent on other processes and when the output is not a terminal."""
    from tqdm.auto import tqdm

    return tqdm(items, total=total, desc=what, unit=unit, unit_scale=unit == "B", disable=not shows_progress())


def shows_progress() -> bool:
    """Whether progress bars make sense: on the main process, on a terminal."""
    return is_main_process() and sys.stderr.isatty()
