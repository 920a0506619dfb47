"""JSON values and files, and the checksum with which a record in JSON finds its own damage."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, Union

import xxhash

from pipeline.runs.durable import write_text

Json: TypeAlias = Union[Mapping[str, "Json"], Sequence["Json"], str, float, bool, None]
"""A value that JSON can represent."""

CHECKSUM = "checksum"
"""Key of a sealed record: XXH3-128 of the record's other fields, as JSON with sorted keys."""


class DamagedError(ValueError):
    """A sealed record differs from its checksum."""


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically and durably."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def seal(record: Mapping[str, object]) -> dict[str, object]:
    """Return the record with its checksum."""
    return {**record, CHECKSUM: _checksum(record)}


def unseal(record: Mapping[str, object]) -> dict[str, Any]:
    """Return a record without its checksum. A record without a checksum is returned unchanged.

    Raises:
        DamagedError: the record differs from its checksum.
    """
    rest = {name: value for name, value in record.items() if name != CHECKSUM}
    if CHECKSUM in record and record[CHECKSUM] != (found := _checksum(rest)):
        raise DamagedError(f"its checksum is {record[CHECKSUM]}, but its contents have {found}")
    return rest


def read_record(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a record, and check its checksum if it has one.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file holds something else, or is damaged.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise ValueError(f"holds {type(record).__name__}, not an object")
    return unseal(record)


def _checksum(record: Mapping[str, object]) -> str:
    stored = json.loads(json.dumps(record))  # with the key types and sequences that a reader of the file gets
    return xxhash.xxh3_128_hexdigest(json.dumps(stored, sort_keys=True).encode())
