"""Files that others made are refused before they can block, fill the memory or exhaust the stack."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.runs.foreign_files import (
    MOST_DEPTH,
    describe_irregular,
    find_repeated,
    list_irregular,
    parse_json,
    parse_json_at,
    read_json,
)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


IRREGULAR: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo": (os.mkfifo, "is a named pipe, not a regular file"),
    "socket": (make_socket, "is a socket, not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
    "directory": (Path.mkdir, "is a directory, not a regular file"),
    "loop": (lambda path: path.symlink_to(path.name), "cannot be read (Too many levels of symbolic links)"),
    "broken link": (lambda path: path.symlink_to("nowhere"), "is a symbolic link to nowhere, which does not exist"),
}


@pytest.mark.parametrize("kind", IRREGULAR)
def test_what_is_no_regular_file_is_named_and_not_opened(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    make, expected = IRREGULAR[kind]
    make(Path("x.json"))
    with pytest.raises(UserError) as error:
        read_json(Path("x.json"))
    assert str(error.value) == f"x.json: {expected}."
    is_directory = kind == "directory"  # a directory may have subdirectories
    assert list_irregular(Path()) == (
        [] if is_directory else [f"x.json: {expected}. Fetch the file again, or remove it."]
    )


def test_a_missing_file_and_a_long_name_are_described(tmp_path: Path) -> None:
    assert describe_irregular(tmp_path / "x") == "is missing"
    assert describe_irregular(tmp_path / ("x" * 300)) == "cannot be read (File name too long)"
    assert describe_irregular(Path("a\0b")) == "cannot be read (embedded null byte)"


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_may_be_nested_up_to_a_limit_however_large_the_stack_is(opening: str) -> None:
    closing = "]" if opening == "[" else "}"
    for depth in (MOST_DEPTH + 1, 900, 100_000):
        text = opening * depth + "1" + closing * depth
        for parse in (parse_json, lambda each: parse_json_at(each, 0), lambda each: parse_json(each.encode())):
            with pytest.raises(ValueError, match=f"nested more than {MOST_DEPTH} levels deep"):
                parse(text)
    text = opening * MOST_DEPTH + "1" + closing * MOST_DEPTH
    assert parse_json_at(f"{text} x", 0) == (parse_json(text), len(text))


def test_wide_json_is_not_deep() -> None:
    assert len(parse_json("[" + "[1]," * 10_000 + "[]]")) == 10_001


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(UserError, match=r"has 1,000,000,000,000 bytes. A file of this kind has at most 1,000."):
        read_json(path, most=1000)


@pytest.mark.parametrize("text", ['{"a": 1, "b": {"c": 1, "c": 2}}', '[{"c": 1, "a": 0, "c": 1}]'])
def test_an_object_with_a_key_twice_is_a_user_error_with_the_key(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x.json: an object has the key 'c' twice, so one of its values would be lost"):
        read_json(tmp_path / "x.json")
    marked, _ = parse_json_at(text, 0, marks_repeated=True)
    assert marked == json.loads(text) and find_repeated(marked) == "c" and find_repeated(json.loads(text)) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}".encode("utf-8-sig"), "begins with a byte order mark. Save the file in UTF-8 without this mark"),
        ("{}".encode("utf-16"), "not in UTF-8"),
        ('{"a": "é"}'.encode("latin-1"), "not in UTF-8"),
    ],
)
def test_a_file_that_other_programs_do_not_read_is_a_user_error(text: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(UserError, match=f"x.json: {reason}"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("text", [b"", b"{", b"9" * 5000])
def test_what_is_no_json_is_a_user_error(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "x.json")
