"""Settings as artifacts record them: a flat dictionary from dotted key to plain value."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

from pipeline.config import PipelineConfig
from pipeline.config.secrets import without_secrets

Settings = dict[str, Any]
"""Dotted key -> plain value. The section of `PipelineConfig` declares the type of the value."""

_DATA_PATHS = ("data.path", "data.revision", "data.validation.path", "data.validation.revision", "data.streaming")
OWN_TASKS = "evaluate.lm_eval.include_path"
_PARENT_OF_PATH = {
    "model.path": "source",
    "model.revision": "source",
    "export.source": "model",
    "quantize.source": "sft",
    OWN_TASKS: OWN_TASKS,
    **dict.fromkeys(("evaluate.prompts.path", "evaluate.prompts.revision"), "evaluate.prompts"),
}
"""Setting that names a model, prompts or tasks -> the parent that holds the fingerprint of their contents."""
BLEND = "data.blend"


def choose_settings(config: PipelineConfig, keys: Iterable[str]) -> Settings:
    """Flatten the settings under some keys, or sections, of the configuration."""
    flat: Settings = {}
    for key in keys:
        value = plain(_at(config, key))
        flat.update(_flatten(value, f"{key}.") if isinstance(value, dict) else {key: value})
    return flat


def without_data_paths(settings: Settings) -> Settings:
    """Return the settings without the places of data sets. Their contents have fingerprints of their own."""
    kept = {key: value for key, value in settings.items() if key not in _DATA_PATHS}
    if isinstance(kept.get(BLEND), list):
        kept[BLEND] = [
            {name: value for name, value in part.items() if name not in ("path", "revision")} for part in kept[BLEND]
        ]
    return kept


def without_places(settings: Settings, same: Collection[str]) -> Settings:
    """Return the settings without the places of models, prompts and tasks. `same` names the parents that are equal."""
    return {key: value for key, value in settings.items() if _PARENT_OF_PATH.get(key) not in same}


def plain(value: object) -> Any:
    """Convert settings to dictionaries, lists, texts, numbers and null, as they are stored in JSON and YAML.

    Secrets become `***`. OmegaConf would take 40 milliseconds for the configuration, because it checks all types again.
    """
    return without_secrets(_plain(value))


def _plain(value: object) -> Any:
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value):
        return {name: _plain(each) for name, each in vars(value).items()}
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _at(section: object, key: str) -> object:
    """Return the setting or section with this dotted key. If a section is null, all in it is null too.

    Artifacts record entries of dictionaries with keys of their own, such as data.roles.human. An entry or setting that
    does not exist is null.
    """
    if isinstance(section, dict):
        return section.get(key)  # the user's names may contain dots
    name, _, rest = key.partition(".")
    value = None if section is None else vars(section).get(name)
    return _at(value, rest) if rest else value


def _flatten(node: Mapping, prefix: str) -> Settings:
    flat: Settings = {}
    for name, value in node.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
