"""Finds the columns and keys of rows that are not used, so that no meaning is dropped without a word.

Each is reported once, with its number of rows. A column that changes the meaning but cannot be used is an error.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.config import ColumnsConfig
from pipeline.data.conversations import ConversationError
from pipeline.data.messages import MESSAGE_KEYS, REASONING_KEYS, ROLE_ALIASES

NULL_ARGUMENTS = "nulls in the arguments of tool calls"
"""Stands for nulls that Parquet and saved data sets add to objects. They cannot be told from nulls of the data."""

_FUNCTION_KEYS = frozenset(("name", "arguments"))
_CALL_KEYS = frozenset(("id", "type"))
_SCHEMA_KEYS = frozenset(("type", "name", "description", "parameters"))
_CALL_TYPES = ("json", "<|constrain|>json")
"""Content types of a call that agree with the rendering. Only calls have a content type there."""
_OF_RESULTS = {"channel": "commentary", "recipient": "assistant"}
"""Key of a tool message -> the only value that agrees with the rendering."""
_PART_KEYS = frozenset(("type", "text"))
_IDS = ("id", "_id", "ids", "uuid", "guid", "idx", "index", "row_id", "conversation_id", "session_id", "prompt_id")
_ORIGINS = ("source", "dataset", "url", "license", "created", "created_at", "updated_at", "timestamp", "model", "hash")
_HARMLESS = frozenset((*_IDS, *_ORIGINS, "meta", "metadata", "model_name", "strict", "annotations", "cache_control"))
"""Names of columns and keys that do not change what a conversation means."""
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_MORE_TURNS = "history"
_TEMPLATE_VALUES = "chat_template_kwargs"
_INSTRUCTIONS = ("system", "system_prompt", "system_message", "developer")
_REASONING = ("reasoning", "thinking", "reasoning_content", "analysis", "thought", "cot", "chain_of_thought")


class Unused(NamedTuple):
    """The parts of a row that are not used.

    Attributes:
        keys: columns, and keys of messages and tools.
        settings: column -> name of the setting in data.columns that would use it.
    """

    keys: list[str]
    settings: dict[str, str]


@dataclass
class UnusedCounts:
    """The parts of a data set that are not used.

    Attributes:
        path: the data set.
        key: key of its settings.
        counts: unused column or key -> number of rows that have it.
        settings: column -> name of the setting in data.columns that would use it.
    """

    path: str
    key: str
    counts: Counter[str] = field(default_factory=Counter)
    settings: dict[str, str] = field(default_factory=dict)

    def add(self, unused: Unused, rows: int) -> None:
        """Add a number of rows of which the same is not used."""
        self.counts.update(dict.fromkeys(unused.keys, rows))
        self.settings |= unused.settings

    def warnings(self) -> list[str]:
        """Describe the columns and keys that may matter."""
        found = [
            f"{self.path}: the column {column!r} is not used. To use it, set {self.key}.columns.{name}={column}"
            f" ({self.counts[column]} rows have it)"
            for column, name in self.settings.items()
        ]
        if others := self._names(is_harmless=False):
            found.append(
                f"{self.path}: not part of the conversations: {others}. If the model needs them, see {self.key}.columns"
            )
        return found

    def remarks(self) -> list[str]:
        """Describe the columns and keys that do not change what a conversation means."""
        names = self._names(is_harmless=True)
        return [f"{self.path}: not part of the conversations, and harmless: {names}"] if names else []

    def _names(self, *, is_harmless: bool) -> str:
        names = [name for name in self.counts if name not in self.settings and _is_harmless(name) == is_harmless]
        return ", ".join(f"{name} ({self.counts[name]} row{'s' * (self.counts[name] != 1)})" for name in names)


def find_unused(
    row: Mapping[str, object], columns: ColumnsConfig, used: Iterable[str], messages: Mapping[str, object]
) -> list[str]:
    """Return the columns of a row, and the keys of its messages and tools, that have a value but are not used.

    Args:
        row: the row.
        columns: names of the columns and of the keys of messages.
        used: columns that are used, as dotted paths.
        messages: column -> its list of messages, for each column that holds messages.
    """
    used = set(used)
    found = dict.fromkeys(path for path, _ in _filled(row) if not _is_among(path, used))
    for column, items in messages.items():
        for message in items if isinstance(items, (list, tuple)) else ():
            found |= dict.fromkeys(f"{column}[].{key}" for key in _unused_in_message(message, columns))
    for name in {columns.tools, "functions"} & used:
        tools = row.get(str(name))
        for tool in tools if isinstance(tools, (list, tuple)) else ():
            found |= dict.fromkeys(f"{name}[].{key}" for key in _unused_in_tool(tool))
    return list(found)


def raise_if_needed(row: Mapping[str, object], columns: ColumnsConfig, unused: Iterable[str], key: str) -> None:
    """Check that no column that changes the meaning of a row is unused. `key` is the key of the data set's settings.

    Raises:
        ConversationError: there is one. The error text names it.
    """
    for path in unused:
        name = path.partition(".")[0]
        if name in _MEDIA and not isinstance(row.get(name, row.get(path)), str):
            raise ConversationError(f"has {name!r}, but the model reads only text. Remove the row or the column")
        if name == _MORE_TURNS and columns.prompt is not None:
            raise ConversationError(f"has earlier turns in {name!r}, which would be lost. Put all turns into messages")
        if name == _TEMPLATE_VALUES:
            advice = f". Set {key}.columns.{path.removeprefix(f'{name}.')}={path}" if "reasoning_effort" in path else ""
            raise ConversationError(f"has {path!r}, which changes the prompt and is not used{advice}")


def settings_for(row: Mapping[str, object], columns: ColumnsConfig, has_instructions: bool) -> dict[str, str]:
    """Return the columns with instructions or reasoning that no setting names: column -> name in data.columns.

    Args:
        row: the row.
        columns: names of the columns.
        has_instructions: whether the conversation has instructions of its own.
    """
    named = vars(columns)
    useful = {} if has_instructions or _text(row, columns.system) else dict.fromkeys(_INSTRUCTIONS, "system")
    if columns.completion is not None and columns.reasoning is None:
        useful |= dict.fromkeys(_REASONING, "reasoning")
    if columns.prompt == "instruction" and columns.input is None:
        useful["input"] = "input"
    return {column: name for column, name in useful.items() if _text(row, column) and column not in named.values()}


def _is_harmless(name: str) -> bool:
    return bool({part.removesuffix("[]") for part in name.split(".")} & _HARMLESS)


def _text(row: Mapping[str, object], column: str | None) -> bool:
    value = None if column is None else row.get(column)
    return isinstance(value, str) and bool(value)


def _filled(row: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted path, value) for each column with a value. Nested objects are expanded into their columns."""
    for name, value in row.items():
        if isinstance(value, dict) and value:
            yield from _filled(value, f"{prefix}{name}.")
        elif value not in (None, "", [], {}):
            yield f"{prefix}{name}", value


def _is_among(path: str, used: set[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:end]) in used for end in range(1, len(parts) + 1))


def _unused_in_message(message: object, columns: ColumnsConfig) -> Iterator[str]:
    if not isinstance(message, dict):
        return
    role = ROLE_ALIASES.get(str(message.get(columns.role)), message.get(columns.role))
    filled = [key for key in message if message[key] not in (None, "", [])]
    yield from (key for key in filled if not _is_used(key, message, role, columns))
    for part in message[columns.content] if isinstance(message.get(columns.content), (list, tuple)) else ():
        yield from _others(part, _PART_KEYS, f"{columns.content}[]")
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, (list, tuple)) else ():
        yield from _unused_in_call(call)
    yield from _others(message.get("function_call"), _FUNCTION_KEYS, "function_call")


def _unused_in_call(call: object) -> Iterator[str]:
    if not isinstance(call, dict):
        return
    inner = call.get("function")
    yield from _others(call, _CALL_KEYS | ({"function"} if inner else _FUNCTION_KEYS), "tool_calls[]")
    yield from _others(inner, _FUNCTION_KEYS, "tool_calls[].function")
    if call.get("type") not in (None, "", "function"):
        yield "tool_calls[].type"


def _is_used(key: str, message: Mapping[str, object], role: object, columns: ColumnsConfig) -> bool:
    if key in (columns.role, columns.content, columns.thinking):
        return True
    if key in ("role", "content", "thinking") or (key in REASONING_KEYS and columns.thinking != "thinking"):
        return False
    if key in ("name", "tool_call_id"):
        return role == "tool"
    if key in _OF_RESULTS:
        return role == "assistant" or (role == "tool" and message[key] == _OF_RESULTS[key])
    if key == "content_type":
        is_call = any(message.get(name) for name in ("recipient", "tool_calls", "function_call"))
        return role == "assistant" and is_call and message[key] in _CALL_TYPES
    return key in MESSAGE_KEYS


def _unused_in_tool(tool: object) -> Iterator[str]:
    if isinstance(tool, dict):
        inner = tool.get("function")
        yield from _others(tool, frozenset(("type", "function")) if inner else _SCHEMA_KEYS, "")
        yield from _others(inner, _SCHEMA_KEYS, "function")


def _others(value: object, known: frozenset[str], where: str) -> Iterator[str]:
    """Yield the keys of an object that have a value and are not known."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if key not in known and inner not in (None, "", []):
            yield f"{where}.{key}" if where else str(key)
