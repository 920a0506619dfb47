"""Describe every setting for the help and docs/configuration.md. The texts come from the classes of the sections."""

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from itertools import pairwise
from types import NoneType
from typing import Union, get_args, get_origin

from pipeline.config.bounds import Bound, bounds_of, composed_defaults
from pipeline.config.keys import types_of
from pipeline.config.pipeline import PipelineConfig

_TYPES: dict[object, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Union[bool, str]: "true, false or text",
}
_PLURALS = {"whole number": "whole numbers", "number": "numbers", "text": "texts", "name": "names"}


@dataclass(frozen=True)
class Description:
    """Description of one setting.

    Attributes:
        key: dotted key of the setting. `[]` stands for each element of a list.
        type: kind of value, in words. Example: "whole number or null".
        default: default value as written on the command line, or "required".
        choices: all values of the setting, or () if they cannot be listed.
        limits: other conditions on the value, in words.
        meaning: one or two sentences about the setting.
    """

    key: str
    type: str
    default: str
    choices: tuple[str, ...]
    limits: tuple[str, ...]
    meaning: str


@cache
def describe_settings() -> tuple[Description, ...]:
    """Describe every setting, in the order of the source. The help asks for the descriptions once per section."""
    return tuple(_described(PipelineConfig))


def _described(section: type, prefix: str = "") -> Iterator[Description]:
    """Describe the settings of a section and of the sections in it."""
    meanings, types, bounds = _meanings(section), types_of(section), bounds_of(section)
    composed = composed_defaults(section)
    for item in fields(section):
        key, kind = f"{prefix}{item.name}", types[item.name]
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _described(kind, f"{key}.")
            continue
        element = get_args(kind)[0] if get_origin(kind) is list else kind
        own = bounds[item.name]
        limits = tuple(bound.meaning for bound in own if not bound.choices)
        default = composed.get(item.name) or _default(item)
        choices = _choices(_without_null(element), own)
        yield Description(key, _type(kind), default, choices, limits, meanings[item.name])
        if isinstance(element, type) and is_dataclass(element):
            yield from _described(element, f"{key}[].")


@cache
def _meanings(section: type) -> dict[str, str]:
    """Map each field to its meaning: the string below it in the source, or its metadata if the class has no source."""
    found = {item.name: item.metadata["meaning"] for item in fields(section) if item.metadata}
    if len(found) == len(fields(section)):
        return found
    for each in reversed(section.__mro__):
        if not is_dataclass(each):
            continue
        body = _class_bodies(each.__module__)[each.__name__]
        for statement, below in pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[statement.target.id] = str(below.value.value)
    return found


@cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    """Parse a module once. `inspect.getsource` of a class would parse it again for each class."""
    source = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in source.body if isinstance(node, ast.ClassDef)}


def _without_null(kind: object) -> object:
    """Return X for Optional[X], and any other type unchanged."""
    others = [each for each in get_args(kind) if each is not NoneType]
    return others[0] if len(others) < len(get_args(kind)) else kind


def _type(kind: object) -> str:
    """Return the kind of value in words."""
    arguments = get_args(kind)
    if get_origin(kind) is list:
        return f"list of {_PLURALS.get(_type(arguments[0]), 'settings')}"
    if get_origin(kind) is dict:
        return f"mapping of {_PLURALS[_type(arguments[0])]} to {_PLURALS.get(_type(arguments[1]), 'values')}"
    if NoneType in arguments:
        return f"{_type(_without_null(kind))} or null"
    return "name" if inspect.isclass(kind) and issubclass(kind, Enum) else _TYPES.get(kind, "settings")


def _default(item: Field) -> str:
    value = item.default_factory() if item.default_factory is not NO_DEFAULT else item.default
    values = value if isinstance(value, list) else [value]
    shown = ", ".join(str(v.name if isinstance(v, Enum) else v) for v in values)
    return {"None": "null", "???": "required", "True": "true", "False": "false"}.get(shown, shown)


def _choices(kind: object, bounds: tuple[Bound, ...]) -> tuple[str, ...]:
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return tuple(member.name for member in kind)
    return tuple(choice for bound in bounds for choice in bound.choices)
