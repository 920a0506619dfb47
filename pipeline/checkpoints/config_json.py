"""Reads and writes config.json of a model directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints.dtypes import dtype_name
from pipeline.errors import UserError
from pipeline.runs.json_files import write_json

CONFIG = "config.json"


def read_config(directory: Path, name: str = CONFIG) -> dict[str, Any]:
    """Read config.json of a model directory, or another JSON file there.

    Raises:
        UserError: the directory or the file does not exist, or the file is not a JSON object.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory.")
    path = directory / name
    if not path.is_file():
        raise UserError(f"{directory}: has no {name}, so it is not a model directory.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds {type(config).__name__}, not an object.")
    return config


def is_quantized(config: Mapping[str, object]) -> bool:
    """Return whether a config.json describes a quantized checkpoint, such as the released gpt-oss in MXFP4."""
    return "quantization_config" in config


def write_config(directory: Path, config: Mapping[str, object], dtype: torch.dtype) -> None:
    """Write config.json of a plain checkpoint: `config` without its quantization, and with the data type `dtype`."""
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    write_json(directory / CONFIG, {**plain, "dtype": dtype_name(dtype)})
