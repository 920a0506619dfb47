"""List the keys of all settings. OmegaConf's schema has their types."""

import copy
import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType
from typing import TYPE_CHECKING, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

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
    return key in _types() or is_mapping(key)


def is_mapping(key: str) -> bool:
    """Return whether a key is a setting of type dict, or a name in it, such as data.roles.human. It takes any names."""
    return any(key == mapping or key.startswith(f"{mapping}.") for mapping in _mappings())


def is_list(key: str) -> bool:
    """Return whether a key is a setting that takes a list."""
    return get_origin(_without_null(_types().get(key))) is list


def unknown_key(key: str, where: str) -> str:
    """Return the error message for a key that the schema does not have. `where` names the place of the key."""
    return f"{where}: unknown key {key!r}.{did_you_mean(key, setting_keys())} `--help` lists all keys."


def schema() -> DictConfig:
    """Return a new configuration with the defaults. It refuses unknown keys and values of the wrong type."""
    return copy.deepcopy(_schema())


@cache
def _schema() -> DictConfig:
    """Build the schema once, because building it takes longer than all other work on the command line."""
    return OmegaConf.structured(PipelineConfig)


@cache
def _types() -> dict[str, object]:
    return dict(_settings(PipelineConfig))


@cache
def _mappings() -> list[str]:
    return [key for key, kind in _types().items() if get_origin(_without_null(kind)) is dict]


def _settings(section: type["DataclassInstance"], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, kind in types_of(section).items():
        yield prefix + name, kind
        if inspect.isclass(kind) and is_dataclass(kind):
            yield from _settings(kind, f"{prefix}{name}.")


def _without_null(kind: object) -> object:
    """Return X for Optional[X], and any other type unchanged."""
    others = [each for each in get_args(kind) if each is not NoneType]
    return others[0] if len(others) == 1 and NoneType in get_args(kind) else kind
