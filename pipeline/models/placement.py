"""Place models on GPUs, and check that models fit into memory before they are loaded."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from pipeline.checkpoints.config_json import is_quantized, read_config
from pipeline.checkpoints.gpt_oss import Shape, loaded_bytes
from pipeline.config import Sharding
from pipeline.models.sharding import STRATEGIES
from pipeline.runs import host_memory
from pipeline.runs.console import say, warn
from pipeline.runs.disk import distinct_gigabytes
from pipeline.runs.processes import local_process_count, process_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)

_ROOM = 1.3  # memory that a forward pass needs, weights included, as a multiple of the weights' size


def place(model: Model, spread: bool = False) -> Model:
    """Move the model to the GPU if it fits there. Otherwise it stays on the CPU, with a warning.

    Args:
        model: the model.
        spread: whether a model that does not fit on one GPU may be spread over all visible GPUs. If this is true, the
            model must be a plain gpt-oss without adapters and quantizers. Also, only the main process may call this.
    """
    if not torch.cuda.is_available():
        return model
    gc.collect()
    torch.cuda.empty_cache()  # otherwise the memory of an earlier model counts as used
    needed, free = _ROOM * _weight_bytes(model), torch.cuda.mem_get_info()[0]
    if free > needed:
        return model.to("cuda")
    if spread and (placed := _spread(model)) is not None:
        return placed
    wanted, there = distinct_gigabytes(needed, free)
    others = f", and {torch.cuda.device_count()} GPUs are too small together" if spread else ""
    warn(
        "loading",
        f"the model stays on the CPU, which is much slower. On a GPU it needs {wanted} (its weights and"
        f" room for a forward pass), but {there} are free{others}. Use a GPU with more free memory.",
    )
    return model


def _spread(model: Model) -> Model | None:
    """Spread the layers over all visible GPUs. Return None if they do not fit."""
    from accelerate import dispatch_model

    causal = cast("PreTrainedModel", model)
    free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    placement = spread_layers(causal, [int(each / _ROOM) for each in free])
    if placement is None:
        return None
    used = sorted(set(placement.values()))
    say("loading", f"the model is spread over {len(used)} GPUs, because it does not fit on one")
    # dispatch_model does not move these arguments, so the key-value cache of each layer stays on the layer's GPU.
    skipped: Any = causal._skip_keys_device_placement
    return dispatch_model(model, cast(Any, placement), skip_keys=skipped)


def spread_layers(model: "PreTrainedModel", budgets: Sequence[int]) -> dict[str, int] | None:
    """Choose a GPU for each module, in the order of the layers.

    The first GPU also gets everything outside of the layers. So a forward pass begins and ends on the first GPU. Code
    that uses the hidden states and the head works only with the first GPU.

    Args:
        model: a gpt-oss model.
        budgets: bytes of weights that each GPU may hold.

    Returns:
        The number of the GPU for each module, keyed by the module's name, or None if the model does not fit.
    """
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    outside = [name for name, _ in model.named_children() if name != prefix]
    outside += [f"{prefix}.{name}" for name, _ in decoder.named_children() if name != "layers"]
    placement = dict.fromkeys(outside, 0)
    layers = decoder.get_submodule("layers")
    left = [budgets[0] - sum(_weight_bytes(model.get_submodule(name)) for name in outside), *budgets[1:]]
    gpu = 0
    for name, layer in layers.named_children():
        size = _weight_bytes(layer)
        while gpu < len(left) and left[gpu] < size:
            gpu += 1
        if gpu == len(left):
            return None
        left[gpu] -= size
        placement[f"{prefix}.layers.{name}"] = gpu
    return placement if left[0] >= 0 else None


def _weight_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def copies_in_host_memory(shared: Sharding) -> float:
    """Return how many copies of the weights are in the host memory of this machine during training."""
    if torch.cuda.is_available():
        return 0  # the weights are on the GPUs
    shards = process_count() if "weights" in STRATEGIES[shared].sharded else 1
    return local_process_count() / shards


def raise_if_host_too_small(
    stage: str,
    directory: Path,
    dtype: torch.dtype,
    copies: float = 1,
    *,
    is_decoded: bool = False,
    is_packed: bool = False,
) -> None:
    """Check that the weights of a model fit into the free host memory. Call this before the model is loaded.

    Args:
        stage: name of the stage, for the message.
        directory: directory of the checkpoint. For adapters, pass the directory of their base.
        dtype: type of the weights after loading.
        copies: number of copies that the processes on this machine load together.
        is_decoded: whether packed experts are decoded in memory. Otherwise they stay packed.
        is_packed: whether plain experts are packed in memory. Otherwise they stay plain.

    Raises:
        MachineError: the weights do not fit.
    """
    config = read_config(directory)
    stays_packed = is_packed or (is_quantized(config) and not is_decoded)
    size = loaded_bytes(Shape.of(config, str(directory)), dtype.itemsize, stays_packed=stays_packed)
    host_memory.raise_if_too_small(stage, int(size * copies), f"loading {directory}")
