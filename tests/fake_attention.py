"""Runs one attention layer of gpt-oss-20b on fake CUDA tensors. Needs a process of its own.

Usage: python -m tests.fake_attention "<implementation> <layer type> <padded|packed>" ... Prints a JSON object. For
each case it has:

largest: number of elements of the largest tensor.
scores: number of all scores.
kernels: the flash kernels that ran, each with its window.
gradients: shapes of all gradients on CUDA.
"""

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GptOssConfig
from transformers.masking_utils import create_masks_for_generate
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from pipeline.doctor import fake_gpu
from pipeline.models.sink_attention import Segments

ROWS, TOKENS = 4, 4096
DOCUMENTS = 7


class Watch(TorchDispatchMode):
    """Records the size of the largest tensor on CUDA, and the flash kernels that run, each with its window."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.kernels: list[tuple[str, int | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if "flash_attention" in str(func):
            window = (kwargs or {}).get("window_size_left")
            self.kernels.append((str(func).split(".")[1], window))
        on_gpu = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf.device.type == "cuda"]
        self.largest = max(self.largest, *(leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in on_gpu), 0)
        return found


def masks(config: GptOssConfig, hidden: Tensor, kind: str) -> Any:
    """Make the masks of both types of layers, as the model does."""
    if config._attn_implementation == "eager":  # transformers' eager_mask would make a real CUDA tensor
        return dict.fromkeys(config.layer_types, torch.empty(ROWS, 1, TOKENS, TOKENS))
    if kind == "packed":
        return dict.fromkeys(config.layer_types, Segments(torch.empty(DOCUMENTS + 1, dtype=torch.int32), TOKENS))
    return create_masks_for_generate(config, hidden, torch.ones(ROWS, TOKENS, dtype=torch.long), None)


def run(implementation: str, layer_type: str, kind: str) -> dict[str, Any]:
    """Run the layer forward and backward, and return the figures of this case."""
    config = GptOssConfig(attn_implementation=implementation)  # its default sizes are those of both released models
    rows, tokens = (1, ROWS * TOKENS) if kind == "packed" else (ROWS, TOKENS)
    with FakeTensorMode(), Watch() as watch, torch.device("cuda"):
        layer = GptOssAttention(config, config.layer_types.index(layer_type))
        hidden = torch.empty(rows, tokens, config.hidden_size, requires_grad=True)
        angles = torch.empty(1, tokens, config.head_dim // 2)
        mask = masks(config, hidden, kind)[layer_type]
        layer(hidden, (angles, angles), mask)[0].sum().backward()
    shapes = {name: list(each.grad.shape) for name, each in layer.named_parameters() if each.grad.is_cuda}
    scores = ROWS * config.num_attention_heads * TOKENS**2
    return {"largest": watch.largest, "scores": scores, "kernels": watch.kernels, "gradients": shapes}


if __name__ == "__main__":
    fake_gpu.install()
    torch.set_default_dtype(torch.bfloat16)
    with fake_gpu.pretend_cuda():
        print(json.dumps({case: run(*case.split()) for case in sys.argv[1:]}), flush=True)
    # autograd has a thread for the fake device. Now and then, torch aborts the process when it destroys this thread.
    os._exit(0)
