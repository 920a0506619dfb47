"""Shard a tiny model with FSDP2, run two passes, and record their collectives and types.

A launcher starts this script in each process. The script gets the directory of a checkpoint, and a file to which the
main process writes what it recorded.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.checkpoints.gpt_oss import DECODER_LAYER_CLASS
from pipeline.config import Precision, Sharding, TrainConfig
from pipeline.models import loading, sharding
from pipeline.models.references import ModelRef
from pipeline.runs.processes import is_main_process, wait_for_everyone


class Collectives(TorchDispatchMode):
    """Records the name and the element type of each collective."""

    def __init__(self, model: nn.Module) -> None:
        """`before` lists the number of collectives before each layer's first projection in the forward pass."""
        super().__init__()
        self.seen: list[tuple[str, str]] = []
        self.before: list[int] = []
        projections = (module for name, module in model.named_modules() if name.endswith("self_attn.q_proj"))
        self.hooks = [each.register_forward_hook(lambda *_: self.before.append(len(self.seen))) for each in projections]

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        name = str(function)
        if name.startswith("c10d."):
            tensors = [each for each in args if isinstance(each, Tensor)]
            self.seen.append((name.split(".")[1], str(tensors[-1].dtype) if tensors else ""))
        return function(*args, **(kwargs or {}))


def watch_layers(model: nn.Module, seen: set[tuple[str, ...]]) -> None:
    """Record the types of each decoder layer's input and output, and the type of a weight while the layer uses it."""

    def record_stream(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.add(("input", str(inputs[0].dtype)))
        seen.add(("output", str(output.dtype)))

    def record_weight(module: Any, *_: object) -> None:
        seen.add(("weight", str(module.weight.dtype)))

    for module in model.modules():
        if type(module).__name__.endswith(DECODER_LAYER_CLASS):
            module.register_forward_hook(record_stream)
            module.get_submodule("self_attn.q_proj").register_forward_hook(record_weight)


def main(directory: Path, results: Path) -> None:
    train = TrainConfig(precision=Precision.mixed_bf16)
    model = loading.load_to_train(ModelRef("base", directory, directory), train, "eager", Sharding.fsdp2)
    layers: set[tuple[str, ...]] = set()
    watch_layers(model, layers)
    sharding.STRATEGIES[Sharding.fsdp2].set_gathers(model, train)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.arange(32).reshape(2, 16)
    found: list[list[tuple[str, str]]] = []
    before: list[int] = []
    for _ in range(2):
        with Collectives(model) as collectives:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            before = list(collectives.before)
            loss.backward()
        for hook in collectives.hooks:
            hook.remove()
        found.append(collectives.seen)
    facts = {
        "passes": found,
        "before": before,
        "layers": sorted(layers),
        "gradients": sorted(
            {f"{type(p.grad).__name__} {p.grad.dtype}" for p in model.parameters() if p.grad is not None}
        ),
        "stored": sorted({f"{type(p).__name__} {p.dtype}" for p in model.parameters()}),
    }
    if is_main_process():
        results.write_text(json.dumps(facts), encoding="utf-8")
    wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
