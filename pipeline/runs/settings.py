"""Settings as artifacts record them: a flat dictionary from dotted key to plain value."""

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from omegaconf import OmegaConf

from pipeline.config import PipelineConfig

Settings = dict[str, Any]
"""Dotted key -> plain value. The section of `PipelineConfig` declares the type of the value."""


def choose_settings(config: PipelineConfig, keys: Iterable[str]) -> Settings:
    """Flatten the settings under some keys, or sections, of the configuration."""
    keys = tuple(keys)
    sections = {key.partition(".")[0] for key in keys}  # OmegaConf is slow to convert the whole configuration
    node = OmegaConf.create({name: value for name, value in vars(config).items() if name in sections})
    flat: Settings = {}
    for key in keys:
        value = OmegaConf.select(node, key)
        if OmegaConf.is_config(value):
            plain = OmegaConf.to_container(value, enum_to_str=True)
            flat.update(_flatten(plain, f"{key}.") if isinstance(plain, dict) else {key: plain})
        else:
            flat[key] = value.name if isinstance(value, Enum) else value
    return flat


def _flatten(node: Mapping, prefix: str) -> Settings:
    flat: Settings = {}
    for name, value in node.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
