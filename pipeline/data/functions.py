"""Checks texts, tool calls and the schemas of functions."""

import math
import re
from collections.abc import Mapping
from typing import cast

from pipeline.checkpoints.gpt_oss import SPECIAL_TOKENS
from pipeline.data.conversations import ConversationError, FunctionSchema, Tool, ToolCall
from pipeline.runs.foreign_files import MOST_DEPTH, describe_error, is_too_deep, parse_json
from pipeline.runs.json_files import Json

_ADDED = {"name": "Add it", "description": "Add it. It may be an empty text"}
_NAMESPACE = "functions."
_ENCODED_TWICE = 2
_OBJECT = "Give an object, or its text in JSON"


def strip_namespace(name: str) -> str:
    """Return the name of a function without Harmony's namespace `functions.`, which the rendering adds."""
    return name.removeprefix(_NAMESPACE)


def check_text(where: str, text: str) -> None:
    """Check that a text can be tokenized, and contains no special token.

    Raises:
        ConversationError: it contains a special token or half of a surrogate pair.
    """
    special = next((token for token in SPECIAL_TOKENS.values() if token in text), None)
    if special is not None:
        raise ConversationError(f"{where} contains the special token {special}, which would end the message")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(f"{where} is not valid Unicode: it contains half of a surrogate pair") from error


def check_json(where: str, value: object) -> None:
    """Check that a value consists only of JSON types, and check all text in it, including keys.

    Raises:
        ConversationError: it has another type, is nested too deeply, or has a text that `check_text` refuses.
    """
    if is_too_deep(value):
        raise ConversationError(f"{where} is nested more than {MOST_DEPTH} levels deep")
    _check_values(where, value)


def _check_values(where: str, value: object) -> None:
    if isinstance(value, str):
        check_text(where, value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_values(where, key)
            _check_values(where, inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_values(where, inner)
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise ConversationError(f"{where} has a {type(value).__name__}, which is not a JSON type")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConversationError(f"{where} has the number {value}, which JSON does not have")


def make_call(where: str, name: str, arguments: object) -> ToolCall:
    """Make a tool call. `arguments` is an object, None, or the JSON text of an object, which may be encoded twice.

    Raises:
        ConversationError: the arguments are something else, or the name cannot stand in a message's header.
    """
    name = strip_namespace(name)
    check_name(where, name)
    decoded = _arguments(where, arguments)
    check_json(where, [name, decoded])
    return {"type": "function", "function": {"name": name, "arguments": cast(Json, decoded)}}


def check_name(where: str, name: str) -> None:
    """Check that a function's name can stand in a message's header.

    Raises:
        ConversationError: it is empty, or contains white space.
    """
    if not name or re.search(r"\s", name):
        raise ConversationError(f"{where} has the name {name!r}. A function's name has no white space")


def _arguments(where: str, value: object) -> dict[str, object]:
    # OpenAI's API gives arguments as JSON text. Some programs encode this text a second time.
    for _ in range(_ENCODED_TWICE):
        if isinstance(value, str) and value.strip():
            try:
                value = parse_json(value)
            except ValueError as error:
                raise ConversationError(f"{where}.arguments: {describe_error(error)}. {_OBJECT}") from error
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if not isinstance(value, dict):
        raise ConversationError(f"{where}.arguments is a {type(value).__name__}, not an object. {_OBJECT}")
    return value


def parse_tools(tools: object) -> list[Tool] | None:
    """Check the functions that a row offers: a list of schemas, the JSON text of such a list, or nothing.

    Raises:
        ConversationError: they have another form, or a function has no name or description.
    """
    if isinstance(tools, str) and tools.strip():
        try:
            tools = parse_json(tools)
        except ValueError as error:
            raise ConversationError(f"'tools': {describe_error(error)}") from error
    if not tools or isinstance(tools, str):
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        raise ConversationError(
            "'tools' is not a list of function schemas. Give a list of objects with name and description"
        )
    return [{"type": "function", "function": _schema(f"tools[{i}]", tool)} for i, tool in enumerate(tools)]


def _schema(where: str, tool: Mapping[str, object]) -> FunctionSchema:
    kind = tool.get("type")
    if isinstance(kind, str) and kind != "function":
        raise ConversationError(
            f"{where} is of type {kind!r}, but the model calls only functions. Remove it, or make it a function"
        )
    found = tool.get("function") or tool
    schema = {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else {}
    for key in ("name", "description"):
        if not isinstance(schema.get(key), str):
            called = schema.get("name") if isinstance(found, dict) else found
            raise ConversationError(f"{where} ({called!r}) has no {key}, which the chat template needs. {_ADDED[key]}")
    if not isinstance(schema.get("parameters", {}), dict):
        raise ConversationError(f"{where} ({schema['name']!r}): parameters is not a JSON schema. Give an object")
    schema["name"] = strip_namespace(schema["name"])
    check_name(where, schema["name"])
    check_json("'tools'", schema)
    return cast(FunctionSchema, schema)
