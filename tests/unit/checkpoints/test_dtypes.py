"""The table of types agrees with torch and safetensors."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.checkpoints.dtypes import (
    PLAIN_TYPES,
    STORED_TYPES,
    TRAIN_TYPES,
    bytes_per_value,
    dtype_name,
    stored_name,
    torch_dtype,
)
from pipeline.checkpoints.gpt_oss import TensorInfo
from pipeline.config import Precision

TORCH_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
}


def test_every_type_has_its_torch_type_and_back() -> None:
    assert STORED_TYPES.keys() == TORCH_TYPES.keys()
    for name, dtype in TORCH_TYPES.items():
        assert torch_dtype(name) is dtype
        assert stored_name(dtype) == name
        assert bytes_per_value(name) == dtype.itemsize


def test_sizes_of_tensors_are_the_same_as_in_torch() -> None:
    for name, dtype in TORCH_TYPES.items():
        assert TensorInfo(name, (3, 5, 7)).bytes == torch.empty(3, 5, 7, dtype=dtype).nbytes
        assert TensorInfo(name, ()).bytes == torch.empty((), dtype=dtype).nbytes


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_names_are_the_same_as_in_safetensors_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"one": torch.zeros(3, dtype=torch.uint8).to(TORCH_TYPES[name])}, path)
    with safe_open(path, framework="pt") as file:
        assert file.get_slice("one").get_dtype() == name


def test_an_unknown_type_is_an_error() -> None:
    with pytest.raises(KeyError):
        stored_name(torch.complex64)
    with pytest.raises(KeyError):
        torch_dtype("I4")
    with pytest.raises(KeyError):
        bytes_per_value("I4")


def test_names_in_configurations_are_torch_names() -> None:
    assert dtype_name(torch.bfloat16) == "bfloat16"
    assert dtype_name(torch.float32) == "float32"


def test_every_precision_trains_in_a_type_that_a_plain_checkpoint_may_have() -> None:
    assert TRAIN_TYPES.keys() == set(Precision)
    assert set(TRAIN_TYPES.values()) <= set(PLAIN_TYPES)
