"""Overrides as the command line writes them: `key=value`, `+key=value` or `~key=value`."""

import re
import shlex
from collections.abc import Iterable
from typing import Any

from pipeline.config import program
from pipeline.config.groups import RECIPE

_OF_ONE_COMMAND = (
    *("stage", "run_dir", "overwrite", "doctor", "serve", "hydra"),
    *(
        "compare.runs",
        "evaluate.source",
        "evaluate.endpoint",
        "export.push_to_hub",
        "export.source",
        "verify.checkpoint",
    ),
)
"""Keys and sections that say what one command does. They do not belong to the run."""
_SECTIONS = {"train@sft": "sft", "train@qat": "qat", "eval": "evaluate"}
"""Groups whose settings are in a section of another name."""
_NEEDS_NO_QUOTES = re.compile(
    r"(?!\.\d|(?:null|true|false|nan|inf)$)[a-z_./][\w./:%@+ -]*(?<! )", re.ASCII | re.IGNORECASE
)


def is_override(argument: str) -> bool:
    """Return whether an argument gives a key a value, or adds or removes one (`~key=value`). Flags do not."""
    return "=" in argument and not argument.startswith("-")


def key_of(override: str) -> str:
    """Return the key or group, without signs: `sft.epochs` of `+sft.epochs=2`."""
    return override.partition("=")[0].lstrip("+~")


def group_of(section: str) -> str | None:
    """Return the group whose choices set a section of another name: `train@sft` of `sft`. Return None if none does."""
    return next((group for group, name in _SECTIONS.items() if name == section), None)


def by_key(overrides: Iterable[str]) -> dict[str, str]:
    """Map each key to its override. If a key is given twice, the last one counts, and stands last."""
    found: dict[str, str] = {}
    for override in overrides:
        key = key_of(override)
        found.pop(key, None)
        found[key] = override
    return found


def belongs_to_run(key: str) -> bool:
    """Return whether a key is a setting of the run, and not of one command, as `stage` and `overwrite` are."""
    return not any(key == each or key.startswith((f"{each}.", f"{each}/")) for each in _OF_ONE_COMMAND)


def touches(key: str, settings: Iterable[str]) -> bool:
    """Return whether an override with this key can change one of the settings, given by their full keys."""
    changed = _SECTIONS.get(key, key)
    return any(
        key == RECIPE or each == changed or each.startswith(f"{changed}.") or changed.startswith(f"{each}.")
        for each in settings
    )


def plain_value(override: str) -> str | None:
    """Return the text that an override gives its key. Return None for lists, several values and interpolations."""
    value = override.partition("=")[2].strip()
    if "${" in value:
        return None
    if value[:1] in ("'", '"'):
        return _unquoted(value) if value[1:].endswith(value[0]) else None
    unescaped = re.sub(r"\\.", "", value)
    return None if set(unescaped) & set(",[]{}()") else re.sub(r"\\(.)", r"\1", value)


def _unquoted(value: str) -> str:
    """Return a text without its quotes. Inside, a backslash is doubled only in front of a quote, as `quoted` does."""
    return re.sub(rf"(\\*)({value[0]}|$)", lambda m: m[1][: len(m[1]) // 2] + m[2], value[1:-1])


def listed_value(override: str) -> list[Any] | None:
    """Return the list that an override gives its key, as in `data.blend=[{path: a.jsonl, weight: 3}]`.

    Return None for other values, and for interpolations.
    """
    if override.partition("=")[2].strip()[:1] != "[" or "${" in override:
        return None
    # Hydra's parser takes long to import, and most runs record no list.
    from hydra.core.override_parser.overrides_parser import OverridesParser

    value = _plain(OverridesParser.create().parse_override(override).value())
    return value if isinstance(value, list) else None


def _plain(value: Any) -> Any:
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.text if isinstance(value, QuotedString) else value


def swept_values(override: str) -> list[str]:
    """Return the plain values of an override with several values: `a,b` or `choice(a,b)`. Otherwise return none."""
    value = override.partition("=")[2].strip()
    listed = re.fullmatch(r"choice\((.*)\)", value)
    parts = re.findall(r"""(?:'[^']*'|"[^"]*"|[^,'"])+""", listed[1] if listed else value)
    found = [plain_value(f"={part}") for part in parts] if len(parts) > 1 or listed else []
    return [each for each in found if each is not None]


def show_arguments(arguments: list[str]) -> str:
    """Return the command with these arguments, quoted for a shell."""
    return f"{program.name()} {shlex.join(arguments)}"


def assignment(key: str, value: str) -> str:
    """Return the override that sets a key to a text. Hydra reads some characters and words only inside quotes."""
    return f"{key}={value if _NEEDS_NO_QUOTES.fullmatch(value) else quote(value)}"


def override_of(key: str, value: object) -> str:
    """Return the override that sets a key to a plain value: text, number, truth value, null, list or dictionary."""
    return assignment(key, value) if isinstance(value, str) else f"{key}={_text(value)}"


def _text(value: object) -> str:
    if isinstance(value, list):
        return f"[{','.join(_text(each) for each in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_text(each)}' for key, each in value.items())}}}"
    if isinstance(value, str):
        return quote(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def quote(value: str) -> str:
    """Quote a value for an override, so that commas, quotes and brackets have no meaning. `${key}` keeps its own."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(value, Quote.single).with_quotes()
