"""Compile the update of torchao's optimizers for a pretended GPU, and print its memory as JSON (see `main`)."""

import json
from math import prod
from typing import Any

import torch
from kernels_for_gpus import Gpu, pretend
from torchao.optim import AdamW4bit, AdamW8bit, subclass_4bit, subclass_8bit

OPTIMIZERS: dict[str, Any] = {"adamw_torch_8bit": AdamW8bit, "adamw_torch_4bit": AdamW4bit}
SHAPES = ((1024, 2880), (128, 2880, 5760), (8, 100))
BLOCK = 256  # as transformers sets it

for module in (subclass_8bit, subclass_4bit):  # computes the codebooks from real tensors, and keeps them
    module.get_qmap_signed()
    module.get_qmap_unsigned()
gpu = Gpu()
pretend(gpu)


def temporary(name: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a later step of the optimizer allocates."""
    weights = torch.nn.Parameter(torch.empty(shape, device="cuda"))
    weights.grad = torch.empty_like(weights)
    optimizer = OPTIMIZERS[name]([weights], block_size=BLOCK)
    optimizer.step()
    gpu.start()
    before = gpu.live
    optimizer.step()
    assert gpu.launches, "nothing was compiled"
    return gpu.peak - before


def main() -> None:
    """Print a list of (optimizer, number of values, bytes that are allocated in the update)."""
    print(json.dumps([(name, prod(shape), temporary(name, shape)) for name in OPTIMIZERS for shape in SHAPES]))


main()
