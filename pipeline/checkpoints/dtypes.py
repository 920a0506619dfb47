"""Data types of stored tensors: their sizes, and their names in safetensors, in torch and in config.json.

This module imports torch only when a torch type is requested, so sizes can be computed without torch.
"""

from typing import TYPE_CHECKING, NamedTuple

from pipeline.config import Precision

if TYPE_CHECKING:
    import torch


class StoredType(NamedTuple):
    """A type that a safetensors file can hold.

    Attributes:
        name: the type's name in torch, as in `torch.bfloat16`; config.json uses the same name.
        bytes: size of one value.
    """

    name: str
    bytes: int


STORED_TYPES = {
    "F64": StoredType("float64", 8),
    "F32": StoredType("float32", 4),
    "BF16": StoredType("bfloat16", 2),
    "F16": StoredType("float16", 2),
    "U8": StoredType("uint8", 1),
    "I8": StoredType("int8", 1),
    "F8_E8M0": StoredType("float8_e8m0fnu", 1),
    "F8_E4M3": StoredType("float8_e4m3fn", 1),
}
"""Every type that this program knows, by its name in safetensors."""

PLAIN_TYPES = ("BF16", "F32", "F16")
"""Types that the tensors of a plain checkpoint may have."""

TRAIN_TYPES = {Precision.fp32: "F32", Precision.mixed_bf16: "F32", Precision.bf16: "BF16"}
"""Precision of a training stage -> type of the weights during training."""

_STORED_NAMES = {stored.name: name for name, stored in STORED_TYPES.items()}


def bytes_per_value(stored_name: str) -> int:
    """Return the size of one value of a safetensors type.

    Raises:
        KeyError: the type is unknown.
    """
    return STORED_TYPES[stored_name].bytes


def torch_dtype(stored_name: str) -> "torch.dtype":
    """Return the torch type of a safetensors type: `torch.bfloat16` for BF16.

    Raises:
        KeyError: the type is unknown.
    """
    import torch

    return getattr(torch, STORED_TYPES[stored_name].name)


def stored_name(dtype: "torch.dtype") -> str:
    """Return the name of a torch type in safetensors: BF16 for `torch.bfloat16`.

    Raises:
        KeyError: the type is unknown.
    """
    return _STORED_NAMES[dtype_name(dtype)]


def dtype_name(dtype: "torch.dtype") -> str:
    """Return the name of a torch type in config.json: `bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
