"""Reads and writes config.json of a model directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from pipeline.checkpoints.dtypes import dtype_name
from pipeline.checkpoints.gpt_oss import GptOssJson, Shape
from pipeline.errors import UserError
from pipeline.runs.foreign_files import read_json
from pipeline.runs.json_files import write_json

CONFIG = "config.json"


def read_config(directory: Path, name: str = CONFIG) -> dict[str, Any]:
    """Read config.json of a model directory, or another JSON file there.

    Raises:
        UserError: the directory or the file does not exist, or the file is not a JSON object, see
            `foreign_files.read_json`.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory.")
    path = directory / name
    if not path.exists() and not path.is_symlink():
        raise UserError(f"{directory}: has no {name}, so it is not a model directory.")
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds {type(config).__name__}, not an object.")
    return config


def read_model(directory: Path) -> GptOssJson:
    """Read config.json of a gpt-oss model.

    Raises:
        UserError: as `read_config` and `Shape.of`.
    """
    config = read_config(directory)
    Shape.of(config, directory)
    return cast(GptOssJson, config)


def is_quantized(config: Mapping[str, object]) -> bool:
    """Return whether a config.json describes a checkpoint in MXFP4, such as the released gpt-oss.

    An entry of another tool is left over from a model that was merged or decoded, since sources with weights that
    another tool quantized are refused.
    """
    entry = config.get("quantization_config")
    return isinstance(entry, Mapping) and entry.get("quant_method") == "mxfp4"


def write_config(directory: Path, config: Mapping[str, object], dtype: torch.dtype) -> None:
    """Write config.json of a plain checkpoint: `config` without its quantization, and with the data type `dtype`."""
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    write_json(directory / CONFIG, {**plain, "dtype": dtype_name(dtype)})
