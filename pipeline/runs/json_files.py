"""JSON values and files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, Union

from pipeline.runs.durable import write_text

Json: TypeAlias = Union[Mapping[str, "Json"], Sequence["Json"], str, float, bool, None]
"""A value that JSON can represent."""


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically and durably."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
