"""A row of any data set -> a row in chat form: which column holds what is configuration (`data.columns`).

A new data set is a file in conf/data/, not code here.
"""

from collections.abc import Iterator
from typing import Any

from pipeline.config import ColumnsConfig, DataConfig
from pipeline.errors import did_you_mean
from pipeline.harmony import ConversationError

_NEEDED = ("messages", "prompt", "completion")
_MESSAGE_KEYS = ("role", "content", "thinking")
_FILTER = "filter"
_ABSENT = object()
_MOST_NAMES = 40


class Columns:
    """Maps the rows of one data set, and remembers which of the columns that it looks for were ever there."""

    def __init__(self, key: str, data: DataConfig) -> None:
        """
        Args:
            key: of the data set's settings, for messages: `data` or `data.blend[0]`.
            data: columns, roles and filter.
        """
        self._key = key
        self._data = data
        self._wanted = dict(self._looked_for())
        self._met: set[str] = set()
        self._kept_one = False
        self._others: dict[str, None] = {}  # names in rows that lack a wanted column, in order

    def chat_row(self, row: Any) -> dict[str, Any] | None:
        """The row as `harmony.parse_conversation` takes it, or None if data.filter leaves it out.

        Raises:
            ConversationError: a column that every row needs is not there, or no text.
        """
        if not isinstance(row, dict):
            raise ConversationError(f"is a {type(row).__name__}, not an object with {next(iter(self._wanted))!r}")
        found = {column: self._find(row, column) for column in self._data.filter}
        if any(found[column] not in values for column, values in self._data.filter.items()):
            return None
        self._kept_one = True
        columns = self._data.columns
        options = ("tools", "reasoning_effort", "reasoning_language")
        chat = {name: value for name in options if (value := self._optional(row, getattr(columns, name))) is not None}
        messages = self._messages(row) if columns.messages is not None else self._single_turn(row)
        system = self._optional(row, columns.system)
        if system is not None and isinstance(messages, list):
            messages = [{"role": "system", "content": system}, *messages]
        return {"messages": messages, **chat}

    def missing(self) -> list[str]:
        """What is to be said, after the last row, of each column that no row had."""
        there = ", ".join(self._others) or "none"
        return [
            f"{self._key}.{setting}={column!r}: no row of {self._data.path} has that column."
            f"{did_you_mean(column, self._others)} There are: {there}."
            for column, setting in self._wanted.items()
            # Of rows that the filter left out nothing was looked for.
            if column not in self._met and (self._kept_one or setting == _FILTER)
        ]

    def _looked_for(self) -> Iterator[tuple[str, str]]:
        """(column, setting) of what must be in some row: what every row needs, and options that were set by name."""
        usual = ColumnsConfig()
        for name, column in vars(self._data.columns).items():
            must_be_there = name in _NEEDED or column != getattr(usual, name)
            if name not in _MESSAGE_KEYS and column is not None and must_be_there:
                yield column, f"columns.{name}"
        yield from ((column, _FILTER) for column in self._data.filter)

    def _find(self, row: dict[str, Any], path: str) -> Any:
        """The value at a dotted path, a column whose name has the dot in it first; _ABSENT if there is none."""
        value: Any = row
        for part in [path] if path in row else path.split("."):
            if not isinstance(value, dict) or part not in value:
                if path in self._wanted and len(self._others) < _MOST_NAMES:
                    self._others |= dict.fromkeys(_leaves(row))
                return _ABSENT
            value = value[part]
        self._met.add(path)
        return value

    def _needed(self, row: dict[str, Any], path: str) -> Any:
        value = self._find(row, path)
        if value is _ABSENT or value is None:
            raise ConversationError(f"has no {path!r} (it has: {', '.join(_leaves(row)) or 'nothing'})")
        return value

    def _optional(self, row: dict[str, Any], path: str | None) -> Any:
        value = self._find(row, path) if path is not None else None
        return None if value is _ABSENT else value

    def _text(self, row: dict[str, Any], path: str) -> str:
        text = self._needed(row, path)
        if not isinstance(text, str):
            raise ConversationError(f"{path!r} is {type(text).__name__}, not text")
        return text

    def _single_turn(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        columns = self._data.columns
        assert columns.prompt is not None and columns.completion is not None  # config.problems sees to it
        answer = {"role": "assistant", "content": self._text(row, columns.completion)}
        answer["thinking"] = self._optional(row, columns.reasoning)
        return [{"role": "user", "content": self._text(row, columns.prompt)}, answer]

    def _messages(self, row: dict[str, Any]) -> Any:
        assert self._data.columns.messages is not None
        messages = self._needed(row, self._data.columns.messages)
        return [self._message(message) for message in messages] if isinstance(messages, (list, tuple)) else messages

    def _message(self, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        role = message.get(self._data.columns.role)
        chat = {"role": self._data.roles.get(role, role) if isinstance(role, str) else role}
        for key, name in (("content", self._data.columns.content), ("thinking", self._data.columns.thinking)):
            chat[key] = message.get(name)
        chat["tool_calls"] = message.get("tool_calls")
        return chat


def _leaves(row: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of all columns, those of nested objects in place of the object."""
    found: list[str] = []
    for name, value in row.items():
        found += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"]
    return found
