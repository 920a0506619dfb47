"""Hide secrets that a user may have written into a setting. Keys for servers belong into environment variables.

A certain secret has the form of a token, is the password in an address, or follows a flag such as --api-key. A setting
with such a secret is not recorded. The value of `${oc.env:NAME}` is certain if a word of NAME says so, such as KEY or
TOKEN. Other texts only look like secrets, such as password=X. They are hidden wherever settings are shown or stored,
but the setting is recorded, because it may be text of the user's data.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf

HIDDEN = "***"
_SHORTEST = 4  # a shorter value of a variable is part of many words, so it is not hidden
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|AKIA[0-9A-Z]{16}\b"
    r"|(?:sk-|github_pat_|gh[opsur]_|glpat-|nvapi-|xox[abeprs]-)[\w-]{16,})"
)
_PASSWORD = re.compile(r"(?:(?<=http://)|(?<=https://))[^/@\s]+(?=@)|(?<=://)[^/@:\s]*:[^/@\s]+(?=@)")
_LOGIN = re.compile(r"((?<!abfs)(?<!abfss)(?<!wasb)(?<!wasbs)://)[^/@\s]+(?=@)")  # in these, @ follows a container
_PARAMETER = re.compile(r"([?&](?:[\w-]*(?:key|token|secret|password|signature|sig))=)[^&\s]+", re.I)
_ORDINARY = r"(?!(?:eos|bos|pad|unk|sep|cls|mask)[-_]?token|[\w-]*?per[-_]token)"  # of a tokenizer; or a count
_NAME = rf"{_ORDINARY}[\w-]*?(?:api[-_]?key|token|secret|password)"
_VALUE = r"""(?!['"]?\$\{)(?:'[^']*'|"[^"]*"|[^\s,'"\]&]+)"""  # not ${oc.env:NAME}
_ARGUMENT = re.compile(rf"""(?<![\w-])(--{_NAME}['"]?(?:=|\s*,\s*|\s+(?!-)))({_VALUE})""", re.I)
_HEADER = re.compile(r"""(\bauthorization['"]?\s*[:=]\s*['"]?(?:(?:bearer|basic|token)\s+)?)[^\s,'"]+""", re.I)
_BEARER = re.compile(r"(\bbearer\s+)[\w.~+/=-]{8,}", re.I)
_ASSIGNED = re.compile(rf"(?<![\w/-])({_NAME}=)({_VALUE})", re.I)
_FLAG = re.compile(rf"--?{_NAME}", re.I)
_KEY = re.compile(_NAME, re.I)
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


def remember_arguments(command: list[str]) -> None:
    """Remember the secret arguments of a command, to hide them where the program that it starts prints them."""
    for word, shown in zip(command, without_secrets(command), strict=True):
        name, sign, value = word.partition("=")
        secret = word if shown == HIDDEN else value if shown == f"{name}{sign}{HIDDEN}" else ""
        if len(secret) >= _SHORTEST:
            _values.add(secret)


def without_secrets(value: T) -> T:
    """Return the value with `***` in place of secrets.

    Args:
        value: nested mappings and lists of plain values.
    """
    return _clean(value)  # type: ignore[return-value]


def has_secret(override: str) -> bool:
    """Return whether an override certainly contains a secret. `${oc.env:NAME}` contains none: it is only a name."""
    return _without_certain(override) != override


def _texts(node: object) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, (Mapping, list)):
        for each in node.values() if isinstance(node, Mapping) else node:
            yield from _texts(each)


def _clean(value: object) -> object:
    if isinstance(value, str):
        return _clean_text(value)
    if isinstance(value, Mapping):
        return {name: HIDDEN if _is_secret_entry(name, item) else _clean(item) for name, item in value.items()}
    if isinstance(value, list):
        follows_flag = [False, *(isinstance(item, str) and item[:1] == "-" and _is_flag(item) for item in value)]
        return [HIDDEN if after else _clean(item) for item, after in zip(value, follows_flag, strict=False)]
    return value


def _is_secret_entry(name: object, value: object) -> bool:
    is_text = isinstance(value, str) and bool(value) and not value.startswith("${")
    return is_text and isinstance(name, str) and _KEY.fullmatch(name) is not None


def _clean_text(text: str) -> str:
    return _ASSIGNED.sub(rf"\1{HIDDEN}", _LOGIN.sub(rf"\1{HIDDEN}", _without_certain(text)))


def _without_certain(text: str) -> str:
    for secret in sorted(_values, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _PASSWORD.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))
    for pattern in (_PARAMETER, _ARGUMENT, _HEADER, _BEARER):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def _is_flag(word: str) -> bool:
    return _FLAG.fullmatch(word) is not None
