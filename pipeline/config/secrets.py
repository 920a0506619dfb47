"""Hide secrets that a user may have written into a setting. Keys for servers belong into environment variables.

A secret is recognized by its form or by its place: a token of a known form, a login or key in an address, or an
argument such as --api-key X. The value of `${oc.env:NAME}` is a secret if a word of NAME says so, such as KEY or TOKEN.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

HIDDEN = "***"
_SHORTEST = 4  # a shorter value of a variable is part of many words, so it is not hidden
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|(?:sk-|github_pat_|ghp_)[\w-]{16,})")
_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_PARAMETER = re.compile(r"([?&](?:[\w-]*(?:key|token|secret|password))=)[^&\s]+", re.I)
_SECRET_NAME = r"(?<![\w-])[\w-]*(?:api[-_]?key|[-_]token|secret|password)"
_ASSIGNED = re.compile(rf"({_SECRET_NAME})=(?!\$\{{)[^&\s]+", re.I)
_LISTED = re.compile(rf"({_SECRET_NAME},)(?!\$\{{)[^\s,\]]+", re.I)  # as in [--api-key,X]
_FLAG = re.compile(_SECRET_NAME, re.I)
_VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}\s]+)")
_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:api)?(?:key|token|secret|password|passwd|passphrase|pass|pwd|credential|credentials|auth)(?:$|_)", re.I
)

_values: set[str] = set()

T = TypeVar("T")


def remember(composed: DictConfig) -> None:
    """Remember the values of the secret environment variables that a composed configuration names, to hide them.

    They are hidden from now on, for as long as the process lives. A value that is an existing path, such as the home
    of tokens in TOKEN_DIR, is no secret.
    """
    for text in _texts(OmegaConf.to_container(composed, resolve=False)):
        for name in _VARIABLE.findall(text):
            value = os.environ.get(name, "").strip()
            if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST and not os.path.exists(value):
                _values.add(value)


def without_secrets(value: T) -> T:
    """Return the value with `***` in place of secrets.

    Args:
        value: nested mappings and lists of plain values.
    """
    return _clean(value)  # type: ignore[return-value]


def has_secret(override: str) -> bool:
    """Return whether an override contains a secret. `${oc.env:NAME}` contains none, because it is only a name."""
    return without_secrets(override) != override


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, (Mapping, list)):
        for each in node.values() if isinstance(node, Mapping) else node:
            yield from _texts(each)


def _clean(value: object) -> object:
    if isinstance(value, str):
        return _clean_text(value)
    if isinstance(value, Mapping):
        return {name: _clean(item) for name, item in value.items()}
    if isinstance(value, list):
        follows_flag = [False, *(isinstance(item, str) and item[:1] == "-" and _is_flag(item) for item in value)]
        return [HIDDEN if after else _clean(item) for item, after in zip(value, follows_flag, strict=False)]
    return value


def _clean_text(text: str) -> str:
    for secret in sorted(_values, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _PARAMETER.sub(rf"\g<1>{HIDDEN}", _IN_URL.sub(HIDDEN, _TOKEN.sub(HIDDEN, text)))
    return _LISTED.sub(rf"\g<1>{HIDDEN}", _ASSIGNED.sub(rf"\1={HIDDEN}", text))


def _is_flag(word: str) -> bool:
    return _FLAG.fullmatch(word) is not None
