"""The flags of the command line: our own --help and --version, and those of Hydra."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config.groups import GROUPS
from pipeline.config.keys import is_known
from pipeline.errors import did_you_mean


@dataclass(frozen=True)
class _Flag:
    """A flag.

    Attributes:
        name: long name.
        short: short name, or "".
        takes_value: whether a value follows the flag.
        choices: all values, or () if any text is a value.
        is_value_optional: whether the value may be missing. Then only one of the choices is its value.
    """

    name: str
    short: str = ""
    takes_value: bool = False
    choices: tuple[str, ...] = ()
    is_value_optional: bool = False


_FLAGS = (
    _Flag("--help", "-h"),
    _Flag("--hydra-help"),
    _Flag("--version"),
    _Flag("--cfg", "-c", takes_value=True, choices=("job", "hydra", "all")),
    _Flag("--resolve"),
    _Flag("--package", "-p", takes_value=True),
    _Flag("--run", "-r"),
    _Flag("--multirun", "-m"),
    _Flag("--shell-completion", "-sc"),
    _Flag("--config-path", "-cp", takes_value=True),
    _Flag("--config-name", "-cn", takes_value=True),
    _Flag("--config-dir", "-cd", takes_value=True),
    _Flag("--experimental-rerun", takes_value=True),
    _Flag(
        *("--info", "-i"),
        takes_value=True,
        choices=("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
        is_value_optional=True,
    ),
)
"""The flags that Hydra's parser knows (hydra-core 1.3, `get_args_parser`)."""
_MAY_BE_FOLLOWED = [flag for flag in _FLAGS if flag.takes_value or flag.name == "--shell-completion"]
WITH_VALUE = tuple(name for flag in _MAY_BE_FOLLOWED for name in (flag.name, flag.short) if name)
"""Names of flags that may be followed by a value."""


def settings_first(arguments: list[str]) -> list[str]:
    """Return the arguments with all flags behind all settings. Hydra reads only settings that are adjacent."""
    pieces = [*_pieces(arguments)]
    flags = [each for piece in pieces if piece[0].startswith("-") for each in piece]
    return [piece[0] for piece in pieces if not piece[0].startswith("-")] + flags


def problems(arguments: list[str]) -> list[str]:
    """Say which flags are unknown, lack their value, or have a value that is no choice."""
    return [found for piece in _pieces(arguments) if piece[0].startswith("-") and (found := _problem(piece))]


def _pieces(arguments: list[str]) -> Iterator[list[str]]:
    """Yield each setting, each flag, and each flag with its value."""
    waiting: list[str] = []  # a flag whose value may be the next argument
    for argument in arguments:
        flag = _find(argument)
        if waiting and _takes(waiting[0], argument):
            yield [*waiting, argument]
            waiting = []
            continue
        if waiting:
            yield waiting
        waiting = [argument] if flag is not None and flag.takes_value and "=" not in argument else []
        if not waiting:
            yield [argument]
    if waiting:
        yield waiting


def _takes(name: str, argument: str) -> bool:
    flag = _find(name)
    assert flag is not None
    return argument in flag.choices if flag.is_value_optional else not argument.startswith("-")


def _find(argument: str) -> _Flag | None:
    """Return the flag of an argument. A long name may be abbreviated if only one flag begins so."""
    name = argument.partition("=")[0]
    exact = [flag for flag in _FLAGS if name and name in (flag.name, flag.short)]
    if exact or not name.startswith("--") or name == "--":
        return exact[0] if exact else None
    found = [flag for flag in _FLAGS if flag.name.startswith(name)]
    return found[0] if len(found) == 1 else None


def _problem(piece: list[str]) -> str | None:
    """Return the error message for a flag and its value, or None."""
    name, _, attached = piece[0].partition("=")
    flag, value = _find(name), [*piece[1:], attached][0]
    if flag is None:
        key = name.lstrip("-")
        if is_known(key) or key in GROUPS:
            return f"{piece[0]}: settings have no dashes. Write {key}={attached or '<value>'}."
        known = [each.name for each in _FLAGS]
        return f"{piece[0]}: no such flag.{did_you_mean(name, known)} `--help` lists the flags and the settings."
    if flag.takes_value and not value and not flag.is_value_optional:
        return f"{piece[0]}: needs a value, as in {flag.name} {flag.choices[0] if flag.choices else '<value>'}."
    if flag.choices and value and value not in flag.choices:
        return f"{' '.join(piece)}: no such choice. Choose from: {', '.join(flag.choices)}."
    return None
