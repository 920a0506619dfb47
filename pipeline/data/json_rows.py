"""Finds the rows in the text of a JSON file: in a list, or in values that follow each other."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.runs.foreign_files import RepeatedKeyError, find_repeated, parse_json_at

_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Unreadable:
    """Stands for a row that cannot be read. Such a row is reported together with the other bad rows."""

    reason: str


def parse_marked_at(text: str, start: int) -> tuple[object, int]:
    """Parse the value that begins at `start`, with `RepeatedKeys` for objects that have a key twice.

    Returns the value, and the position after it.

    Raises:
        ValueError: it is not valid JSON, or is nested too deeply.
    """
    try:
        return parse_json_at(text, start)
    except RepeatedKeyError:
        return parse_json_at(text, start, marks_repeated=True)


def require_unique(row: object) -> object:
    """Return a row that `parse_marked_at` has parsed, or `Unreadable` if one of its objects has a key twice."""
    key = find_repeated(row)
    return row if key is None else Unreadable(str(RepeatedKeyError(key)))


def elements(text: str, start: int) -> Iterator[tuple[int, object]]:
    """Yield (position, element) for the elements of the JSON list that begins at `start`.

    Raises:
        json.JSONDecodeError: the text is not a JSON list, or has more than the list.
    """
    position = skip_space(text, start + 1)
    is_open = text[position : position + 1] != "]"
    while is_open:
        element, end = _row_at(text, position)
        yield position, element
        end = skip_space(text, end)
        is_open = text[end : end + 1] == ","
        if not is_open and text[end : end + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
        position = skip_space(text, end + 1) if is_open else end
    if (rest := skip_space(text, position + 1)) < len(text):
        raise json.JSONDecodeError("Extra data", text, rest)


def sequence(text: str, start: int) -> Iterator[tuple[int, object]]:
    """Yield (position, value) for JSON values that follow each other, separated by white space.

    Raises:
        json.JSONDecodeError: a value is not valid JSON.
    """
    while start < len(text):
        value, end = _row_at(text, start)
        yield start, value
        start = skip_space(text, end)


def skip_space(text: str, position: int) -> int:
    """Return the position of the first character that is no white space, at or after `position`."""
    found = _SPACE.match(text, position)
    assert found is not None  # the pattern matches the empty text
    return found.end()


def _row_at(text: str, start: int) -> tuple[object, int]:
    try:
        return parse_json_at(text, start)
    except RepeatedKeyError as error:
        _, end = parse_json_at(text, start, marks_repeated=True)
        return Unreadable(str(error)), end
