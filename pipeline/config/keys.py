"""The keys of all settings, and the schema that checks the types of their values."""

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


def types_of(section: type["DataclassInstance"]) -> dict[str, object]:
    """Field of a section -> its type, without bounds. Some types are generic aliases, such as list[str]."""
    hints = get_type_hints(section)
    return {item.name: hints[item.name] for item in fields(section)}


def setting_keys() -> list[str]:
    """Full dotted keys of all settings, sections included."""
    return [key for key, _ in _settings(PipelineConfig)]


def is_known(key: str) -> bool:
    """Whether the schema has a setting or section of this full key."""
    # In a setting that maps names to values, the user chooses the names.
    types = _types()
    return key in types or any(
        get_origin(kind) is dict and key.startswith(f"{mapping}.") for mapping, kind in types.items()
    )


def unknown_key(key: str, where: str) -> str:
    """The message for a key that the schema does not have."""
    return f"{where}: unknown key {key!r}.{did_you_mean(key, setting_keys())} `--help` lists all keys."


def schema() -> DictConfig:
    """A new configuration with the defaults, which refuses unknown keys and wrong types."""
    return copy.deepcopy(_schema())


def value_problem(known: DictConfig, key: str, value: object) -> str | None:
    """Why `value` does not fit the setting `key`, or None. A value that fits is set in `known`."""
    try:
        OmegaConf.update(known, key, value, merge=True)
    except (OmegaConfBaseException, ValueError) as error:
        return f"{key}={value!r}: {str(error).splitlines()[0]}"
    return None


@cache
def _schema() -> DictConfig:
    """Build the schema once, because that takes longer than all other work on a command line."""
    return OmegaConf.structured(PipelineConfig)


@cache
def _types() -> dict[str, object]:
    return dict(_settings(PipelineConfig))


def _settings(section: type["DataclassInstance"], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, kind in types_of(section).items():
        yield prefix + name, kind
        if inspect.isclass(kind) and is_dataclass(kind):
            yield from _settings(kind, f"{prefix}{name}.")
