"""Remove secrets that a user may have written into a setting. Keys for servers belong into environment variables."""

import re
from collections.abc import Mapping
from typing import TypeVar

HIDDEN = "***"
_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_PARAMETER = re.compile(r"([?&](?:[\w-]*(?:key|token|secret|password))=)[^&\s]+", re.I)
_SECRET_NAME = r"-*[\w-]*(?:api[-_]?key|[-_]token|secret|password)"
_ASSIGNED = re.compile(rf"({_SECRET_NAME})=[^&\s]+", re.I)
_FLAG = re.compile(_SECRET_NAME, re.I)

T = TypeVar("T")


def without_secrets(value: T) -> T:
    """Return the value with `***` in place of secrets: logins and keys in URLs, and arguments such as --api-key X.

    Args:
        value: nested mappings and lists of plain values.
    """
    return _clean(value)  # type: ignore[return-value]


def _clean(value: object) -> object:
    if isinstance(value, str):
        return _ASSIGNED.sub(rf"\1={HIDDEN}", _PARAMETER.sub(rf"\g<1>{HIDDEN}", _IN_URL.sub(HIDDEN, value)))
    if isinstance(value, Mapping):
        return {name: _clean(item) for name, item in value.items()}
    if isinstance(value, list):
        follows_flag = [False, *(isinstance(item, str) and item[:1] == "-" and _is_flag(item) for item in value)]
        return [HIDDEN if after else _clean(item) for item, after in zip(value, follows_flag, strict=False)]
    return value


def _is_flag(word: str) -> bool:
    return _FLAG.fullmatch(word) is not None
