"""Name the processor of a measurement, and write the record of a study. This module imports no torch."""

import json
import platform
from pathlib import Path
from typing import Any


def name_processor() -> str:
    """Return the name of this machine's processor, or its architecture if the system does not tell the name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, atomically. See `formatted`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(formatted(record) + "\n", encoding="utf-8")
    unfinished.replace(path)


def formatted(value: Any, indent: str = "") -> str:
    """Return JSON with one line for each innermost dictionary, so that a change of the file can be read."""
    inner = indent + " "
    if isinstance(value, dict) and any(isinstance(each, dict | list) for each in value.values()):
        lines = [f"{inner}{json.dumps(key)}: {formatted(each, inner)}" for key, each in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return "[\n" + ",\n".join(f"{inner}{json.dumps(each)}" for each in value) + f"\n{indent}]"
    return json.dumps(value)
