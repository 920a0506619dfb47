"""Sealed records: JSON with a checksum."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs.json_files import CHECKSUM, DamagedError, read_record, seal, unseal, write_json

RECORD: dict[str, Any] = {"a": 1, "b": [0.1, None, True], "c": {"ü": "\u2028", "1": -0.0}}


def test_a_sealed_record_is_read_back_without_its_checksum(tmp_path: Path) -> None:
    write_json(tmp_path / "record.json", seal(RECORD))
    assert CHECKSUM in json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert read_record(tmp_path / "record.json") == RECORD


def test_a_record_without_a_checksum_is_read_too(tmp_path: Path) -> None:
    write_json(tmp_path / "record.json", RECORD)
    assert read_record(tmp_path / "record.json") == RECORD


def test_the_checksum_is_that_of_the_stored_form() -> None:
    """JSON has no tuples, and its keys are text."""
    assert seal({"x": (1, 2), "y": {1: "one"}})[CHECKSUM] == seal({"y": {"1": "one"}, "x": [1, 2]})[CHECKSUM]


@pytest.mark.parametrize("change", [{"a": 2}, {"b": [0.2, None, True]}, {"d": 0}, {CHECKSUM: "0" * 32}])
def test_a_changed_record_is_damaged(change: dict[str, Any]) -> None:
    with pytest.raises(DamagedError, match="its checksum is"):
        unseal({**seal(RECORD), **change})


def test_another_value_than_a_record_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "list.json", [1])
    with pytest.raises(ValueError, match="holds list, not an object"):
        read_record(tmp_path / "list.json")
