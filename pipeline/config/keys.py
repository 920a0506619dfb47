"""List the keys of all settings, and check the types of their values with OmegaConf's schema."""

import copy
import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.pipeline import PipelineConfig
from pipeline.errors import did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@cache
def types_of(section: type["DataclassInstance"]) -> dict[str, object]:
    """Return the type of each field of a section, without bounds. Some types are generic aliases, such as list[str]."""
    hints = get_type_hints(section)
    return {item.name: hints[item.name] for item in fields(section)}


def setting_keys() -> list[str]:
    """List the full dotted keys of all settings and sections."""
    return [key for key, _ in _settings(PipelineConfig)]


def section_at(key: str) -> type["DataclassInstance"] | None:
    """Return the section with this full key, or None if the key names no section."""
    kind = _types().get(key)
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def is_known(key: str) -> bool:
    """Return whether the schema has a setting or section with this full key."""
    # A setting of type dict accepts any names below its own key, such as data.roles.human.
    types = _types()
    return key in types or any(
        get_origin(kind) is dict and key.startswith(f"{mapping}.") for mapping, kind in types.items()
    )


def unknown_key(key: str, where: str) -> str:
    """Return the error message for a key that the schema does not have. `where` names the place of the key."""
    return f"{where}: unknown key {key!r}.{did_you_mean(key, setting_keys())} `--help` lists all keys."


def schema() -> DictConfig:
    """Return a new configuration with the defaults. It refuses unknown keys and values of the wrong type."""
    return copy.deepcopy(_schema())


def value_problem(known: DictConfig, key: str, value: object) -> str | None:
    """Set `key` to `value` in `known`. Return the error message if the value has the wrong type, else None."""
    try:
        OmegaConf.update(known, key, value, merge=True)
    except (OmegaConfBaseException, ValueError) as error:
        return f"{key}={value!r}: {str(error).splitlines()[0]}"
    return None


@cache
def _schema() -> DictConfig:
    """Build the schema once, because building it takes longer than all other work on the command line."""
    return OmegaConf.structured(PipelineConfig)


@cache
def _types() -> dict[str, object]:
    return dict(_settings(PipelineConfig))


def _settings(section: type["DataclassInstance"], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, kind in types_of(section).items():
        yield prefix + name, kind
        if inspect.isclass(kind) and is_dataclass(kind):
            yield from _settings(kind, f"{prefix}{name}.")
