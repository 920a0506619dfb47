"""The keys of all settings, and the schema that checks their types."""

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.pipeline import PipelineConfig
from pipeline.errors import did_you_mean


def types_of(section: Any) -> dict[str, Any]:
    """Field of a section -> its type without bounds."""
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


def value_problem(known: DictConfig, key: str, value: Any) -> str | None:
    """Why `value` does not fit the setting `key`; None if it fits. The value is then set in `known`."""
    try:
        OmegaConf.update(known, key, value, merge=True)
    except (OmegaConfBaseException, ValueError) as error:
        return f"{key}={value!r}: {str(error).splitlines()[0]}"
    return None


@cache
def _schema() -> DictConfig:
    """Cached, because it takes longer than everything else that is done with a command line."""
    return OmegaConf.structured(PipelineConfig)


@cache
def _types() -> dict[str, Any]:
    return dict(_settings(PipelineConfig))


def _settings(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, kind in types_of(section).items():
        yield prefix + name, kind
        if is_dataclass(kind):
            yield from _settings(kind, f"{prefix}{name}.")
