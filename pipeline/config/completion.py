"""Complete arguments for shells: stages, recipes, groups, keys, values and flags.

A shell calls `python -m pipeline --shell-completion query=<word>` for each Tab. This module imports no large library,
so that the answer comes at once. Hydra's own completion knows neither `python -m` nor the choices of settings.

The files in pipeline/config/shells connect the completion to the shells.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.descriptions import Description, describe_settings
from pipeline.config.groups import GROUPS, Folders
from pipeline.config.help import names_to_explain
from pipeline.config.keys import section_at
from pipeline.config.pipeline import Stage
from pipeline.errors import UserError, did_you_mean

SHELLS = ("bash", "zsh", "fish")
INSTRUCTIONS = """\
To complete arguments with the Tab key, add the line for your shell to its startup file:

  ~/.bashrc                     eval "$(gpt-oss-qat --shell-completion install=bash)"
  ~/.zshrc, after compinit      eval "$(gpt-oss-qat --shell-completion install=zsh)"
  ~/.config/fish/config.fish    gpt-oss-qat --shell-completion install=fish | source

The completion works for gpt-oss-qat, python -m pipeline and scripts/launch. To remove it from a running shell, use
uninstall=<shell> instead of install=<shell>."""
BEFORE = "_GPT_OSS_QAT_BEFORE"
"""Environment variable with the argument before the word to complete."""
_SCRIPTS = Path(__file__).with_name("shells")
_FLAGS = ("--cfg", "--config-dir", "--help", "--hydra-help", "--multirun", "--shell-completion", "--version")
_FLAG_VALUES = {"--cfg": ("all", "hydra", "job"), "--shell-completion": tuple(f"install={shell}" for shell in SHELLS)}
_FLAG_VALUES |= {"-c": _FLAG_VALUES["--cfg"], "-sc": _FLAG_VALUES["--shell-completion"]}
_SHORTENED = 70
"""Largest length of a description, in characters."""


@dataclass(frozen=True, order=True)
class Candidate:
    """A possible continuation of a word.

    Attributes:
        text: the whole word. If it ends with "=" or ".", the word is not complete yet.
        meaning: short description, or an empty string.
    """

    text: str
    meaning: str = ""


def answer(order: str, folders: Folders, before: str = "") -> str:
    """Return the text that `--shell-completion <order>` prints.

    Args:
        order: `install=<shell>`, `uninstall=<shell>`, or `query=<word>` with the word to complete. If it is empty, the
            text explains how to install the completion.
        folders: the folders with the choices of the groups.
        before: the argument before the word to complete.

    Raises:
        UserError: the order is unknown, or names an unknown shell.
    """
    verb, _, rest = order.partition("=")
    if not order:
        return INSTRUCTIONS
    if verb == "query":
        return "\n".join(f"{each.text}\t{each.meaning}" for each in complete(rest, folders, before))
    if verb not in ("install", "uninstall") or rest not in SHELLS:
        shells = ", ".join(f"{'uninstall' if verb == 'uninstall' else 'install'}={shell}" for shell in SHELLS)
        raise UserError(f"--shell-completion {order}: unknown.{did_you_mean(rest, SHELLS)} Use one of {shells}.")
    script = _SCRIPTS / f"{verb}.{rest}"
    return script.read_text(encoding="utf-8").replace("@PYTHON@", _command_of_this_program())


def complete(word: str, folders: Folders, before: str = "") -> list[Candidate]:
    """List the continuations of a word, sorted.

    An empty list means that nothing fits, or that the value is free text, such as a path.
    """
    if before in ("--help", "-h") and "=" not in word and not word.startswith("-"):
        found = _next_parts(word, [Candidate(name) for name in names_to_explain()])
    elif before in _FLAG_VALUES:
        found = [Candidate(value) for value in _FLAG_VALUES[before]]
    elif word.startswith("-"):
        found = [Candidate(flag) for flag in _FLAGS]
    elif "=" in word:
        found = list(_values(word, folders))
    else:
        found = _next_parts(word, list(_keys()))
    return sorted({each for each in found if each.text.startswith(word)})


def _keys() -> Iterator[Candidate]:
    """Yield all groups and settings, each with "=". Elements of lists cannot be set on the command line."""
    for name, meaning in GROUPS.items():
        yield Candidate(f"{name}=", meaning)
    for each in describe_settings():
        if each.key not in GROUPS and "[]" not in each.key:
            yield Candidate(f"{each.key}=", _shortened(each.meaning))


def _next_parts(word: str, candidates: list[Candidate]) -> list[Candidate]:
    """Cut candidates after the next dot. So `sf` is completed to `sft.`, and `sft.` to the settings of this section."""
    found: dict[str, Candidate] = {}
    for each in candidates:
        if each.text.startswith(word):
            dot = each.text.find(".", len(word))
            text = each.text if dot < 0 else each.text[: dot + 1]
            found.setdefault(text, each if dot < 0 else Candidate(text, _purpose(text[:-1])))
    return list(found.values())


def _purpose(section: str) -> str:
    kind = section_at(section)
    return "" if kind is None else _shortened(" ".join((kind.__doc__ or "").split()))


def _values(word: str, folders: Folders) -> Iterator[Candidate]:
    """Yield the values of a setting or group. After a comma or bracket, as in `format=mxfp4,`, yield more values."""
    key, _, value = word.partition("=")
    name = key.lstrip("+")
    begun = re.match(r"(?:.*[,\[(])?", value)
    assert begun is not None
    for choice, meaning in _choices(name, folders):
        yield Candidate(f"{key}={begun[0]}{choice}", meaning)


def _choices(name: str, folders: Folders) -> Iterator[tuple[str, str]]:
    if name == "stage":
        yield from ((stage.name, _shortened(stage.value)) for stage in Stage)
    elif name in GROUPS:
        yield from ((choice, "") for choice in folders.choices(name))
    else:
        for each in describe_settings():
            if each.key == name:
                yield from ((choice, "") for choice in _words(each))


def _words(setting: Description) -> tuple[str, ...]:
    words = ("true", "false") if setting.type.startswith("true or false") else setting.choices
    return (*words, "null") if words and setting.type.endswith("or null") else words


def _shortened(text: str) -> str:
    return text if len(text) <= _SHORTENED else f"{text[: _SHORTENED - 1].rstrip()}…"


def _command_of_this_program() -> str:
    """Return the shell command that starts this program with the interpreter that runs now."""
    root = Path(__file__).resolve().parents[2]
    return f"env PYTHONPATH={shlex.quote(str(root))} {shlex.quote(sys.executable)} -m pipeline"
