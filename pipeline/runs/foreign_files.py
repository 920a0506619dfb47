"""Reads files that others made: only regular files, of limited size, and JSON of limited depth.

A named pipe or a device can block a reader for ever, and never ends. Deeply nested JSON exhausts the stack of Python's
parser and of code that visits the value. So these files are refused before they are read or visited. An object that has
a key twice is refused as well, because a parser would keep one of the values and lose the other without a word.
"""

import codecs
import json
import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

MOST_DEPTH = 100
"""Largest depth of lists and objects within each other in JSON."""
MOST_JSON_BYTES = 1 << 28
"""Largest size of a JSON file of a model directory, in bytes. The tokenizer.json of gpt-oss has 28 MB."""

MISSING = "is missing"
"""What `describe_irregular` returns for a path where nothing is."""

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


class RepeatedKeyError(ValueError):
    """An object in JSON has a key twice."""

    def __init__(self, key: str) -> None:
        """Create the error. `key` is the first repeated key."""
        super().__init__(f"an object has the key {key!r:.100} twice, so one of its values would be lost. Keep one")
        self.key = key


class RepeatedKeys(dict[str, object]):
    """An object of JSON that has a key twice. It has the last value of each key. `key` is the first repeated one."""

    key = ""


def describe_irregular(path: Path) -> str | None:
    """Say what a path is that is not a regular file. Return None for a regular file. Symbolic links are followed.

    The text continues `<path>: `, as in `is a named pipe, not a regular file`.
    """
    try:
        kind = _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    except FileNotFoundError:
        return f"is a symbolic link to {os.readlink(path)}, which does not exist" if path.is_symlink() else MISSING
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long, a null character
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return None if kind is None else f"is {kind}, not a regular file"


def raise_if_irregular(path: Path) -> None:
    """Check that a path is a regular file, before it is opened.

    Raises:
        UserError: it is something else, such as a named pipe.
    """
    if (found := describe_irregular(path)) is not None:
        raise UserError(f"{path}: {found}.")


def list_irregular(directory: Path) -> list[str]:
    """Return one problem for each entry of a directory that is neither a regular file nor a directory."""
    found = {path: describe_irregular(path) for path in sorted(directory.iterdir()) if not path.is_dir()}
    return [f"{path}: {kind}. Fetch the file again, or remove it." for path, kind in found.items() if kind is not None]


def read_bytes(path: Path, most: int = MOST_JSON_BYTES) -> bytes:
    """Read a regular file of at most `most` bytes.

    Raises:
        UserError: it is not a regular file, is larger, or cannot be read.
    """
    raise_if_irregular(path)
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(content) > most:
        raise UserError(f"{path}: has {path.stat().st_size:,} bytes. A file of this kind has at most {most:,}.")
    return content


def read_utf8(path: Path, most: int = MOST_JSON_BYTES) -> str:
    """Read a regular file of text that other programs read as well.

    Raises:
        UserError: see `read_bytes`, or it is not in UTF-8, or begins with a byte order mark.
    """
    content = read_bytes(path, most)
    if content.startswith(codecs.BOM_UTF8):
        raise UserError(f"{path}: begins with a byte order mark. Save the file in UTF-8 without this mark.")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not in UTF-8 ({error}). Save the file in UTF-8.") from error


def read_json(path: Path, most: int = MOST_JSON_BYTES) -> Any:
    """Read a JSON file that others made.

    Raises:
        UserError: see `read_utf8`, or it is not JSON, has a key twice in an object, or is nested more than MOST_DEPTH
            deep.
    """
    try:
        return parse_json(read_utf8(path, most))
    except ValueError as error:
        raise UserError(f"{path}: {describe_error(error)}.") from error


def describe_error(error: ValueError) -> str:
    """Describe an error of `parse_json`, without a full stop."""
    return str(error) if isinstance(error, RepeatedKeyError) else f"not valid JSON ({error})"


def _require_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise RepeatedKeyError(_first_repeated(pairs))
    return made


def _mark_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    marked = RepeatedKeys(made)
    marked.key = _first_repeated(pairs)
    return marked


def _first_repeated(pairs: list[tuple[str, Any]]) -> str:
    return next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)


_DECODER = json.JSONDecoder(object_pairs_hook=_require_unique)
_MARKING_DECODER = json.JSONDecoder(object_pairs_hook=_mark_repeated)


def parse_json(text: str | bytes, hook: Callable[[list[tuple[str, Any]]], Any] = _require_unique) -> Any:
    """Parse JSON. `hook` is the `object_pairs_hook` of `json.loads`.

    Raises:
        RepeatedKeyError: an object has a key twice.
        ValueError: it is not valid JSON, or is nested more than MOST_DEPTH deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=hook)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    brackets = text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else text.count("[") + text.count("{")
    _raise_if_too_deep(value, brackets)
    return value


def parse_json_at(text: str, start: int, *, marks_repeated: bool = False) -> tuple[Any, int]:
    """Parse the JSON value that begins at `start`. Returns the value, and the position after it.

    Args:
        text, start: the text, and a position in it.
        marks_repeated: whether an object that has a key twice becomes `RepeatedKeys`. Otherwise it is an error.

    Raises:
        ValueError: see `parse_json`.
    """
    try:
        value, end = (_MARKING_DECODER if marks_repeated else _DECODER).raw_decode(text, start)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    _raise_if_too_deep(value, text.count("[", start, end) + text.count("{", start, end))
    return value, end


def _raise_if_too_deep(value: object, brackets: int) -> None:
    # Most values have few brackets, so they need not be visited.
    if brackets > MOST_DEPTH and is_too_deep(value):
        raise ValueError(_too_deep())


def _too_deep() -> str:
    return f"nested more than {MOST_DEPTH} levels deep"


def is_too_deep(value: object) -> bool:
    """Return whether lists and objects are nested more than MOST_DEPTH deep."""
    level = [value]
    for _ in range(MOST_DEPTH):
        inner: list[object] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, (list, tuple)):
                inner += each
        level = [each for each in inner if isinstance(each, (dict, list, tuple))]
        if not level:
            return False
    return True


def find_repeated(value: object) -> str | None:
    """Return the first repeated key in a value that `parse_json_at` has marked, or None."""
    if isinstance(value, RepeatedKeys):
        return value.key
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next((found for each in inner if (found := find_repeated(each)) is not None), None)
