"""The memory of torchao's optimizers with states of 8 or 4 bits, and a stand-in for their update on fake tensors.

Each trained tensor has two states. A state has a code for each value, an FP32 scale for each block of values, and an
FP32 codebook with one value for each code. If a tensor is small or has an incomplete block, its states have no codes,
but values of the tensor's type. The source is torchao 0.18: adam.py, subclass_8bit.py and subclass_4bit.py in its optim
package.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

BITS = {"adamw_torch_8bit": 8, "adamw_torch_4bit": 4}
"""Optimizer -> bits of a code."""

_BLOCK = 256  # values; transformers 5.14 sets this size for both optimizers
_SMALLEST = 4096  # values
_FP32_BYTES, _INT64_BYTES = 4, 8


def has_codes(values: int) -> bool:
    """Return whether a tensor with this number of values has states of a few bits. Other tensors have plain states."""
    return values >= _SMALLEST and values % _BLOCK == 0


def state_bytes(optimizer: str, values: int, width: int) -> int:
    """Compute the bytes of one state of a tensor. The tensor has this number of values of `width` bytes each."""
    if not has_codes(values):
        return values * width
    bits = BITS[optimizer]
    return values * bits // 8 + (values // _BLOCK + 2**bits) * _FP32_BYTES


def update_bytes(optimizer: str, values: int) -> int:
    """Compute the bytes that the update of one tensor needs for a short time on a GPU.

    torchao compiles the update. torch 2.13 makes several kernels. Between them, both new states are kept in FP32, with
    their scales. With 4 bits, the codes are kept in int64 as well, because two codes are packed into a byte.
    """
    code = _INT64_BYTES if BITS[optimizer] == 4 else 0
    return 2 * (values * (_FP32_BYTES + code) + values // _BLOCK * _FP32_BYTES) if has_codes(values) else 0


@contextmanager
def fake_update(optimizer: str) -> Iterator[None]:
    """Let one of these optimizers run on fake tensors, which torchao's compiled update cannot use.

    torchao makes the states. In place of the update, the stand-in only allocates the memory that the update needs.
    """
    if optimizer not in BITS:
        yield
        return
    with (
        patch("torchao.optim.adam.single_param_adam", partial(_allocate_update, optimizer)),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


def _allocate_update(optimizer: str, weights: Tensor, *_: object) -> None:
    local = weights.to_local() if isinstance(weights, DTensor) else weights
    torch.empty(update_bytes(optimizer, local.numel()), dtype=torch.uint8, device=local.device)
