"""Build a model whose weights take no memory, and stream its weights from disk to the device that trains.

A process holds one part of one tensor in host memory at a time. Even if many processes train, the host
does not hold a copy of the model for each of them. Adapters and quantizers are added before the weights are read.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.checkpoints.config_json import read_config
from pipeline.errors import CheckFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PART_BYTES = 1 << 22  # weights that are read at once, at least one row; decoding takes a few times as much memory

Read = Callable[[str, slice], Tensor]
"""Function that reads rows of a parameter. It takes the parameter's name in the model, and the rows."""


def build(
    directory: Path, dtype: torch.dtype, change: Callable[["PreTrainedModel"], object] | None = None, **arguments: Any
) -> "PreTrainedModel":
    """Build a checkpoint's model with hollow parameters. Only its buffers, such as RoPE's frequencies, have values.

    A hollow parameter has the shape, type and device of a weight, but all its elements share one place in memory.

    Args:
        directory: directory of the checkpoint. Only its configuration files are read.
        dtype: type of the parameters.
        change: function that changes the model before its parameters become hollow, or None.
        arguments: further arguments of transformers' `from_config`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from pipeline.models import sink_attention  # noqa: F401 (registers the attention in transformers)

    config = AutoConfig.from_pretrained(directory)
    if "quantization_config" in read_config(directory):
        del config.quantization_config  # experts are decoded while they are read
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **arguments)
        if change is not None:
            change(model)
    for owner, attribute, parameter in owned_parameters(model):
        kind = dtype if parameter.is_floating_point() else parameter.dtype
        hollow = torch.zeros((), dtype=kind).expand(parameter.shape)
        setattr(owner, attribute, nn.Parameter(hollow, requires_grad=parameter.requires_grad))
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def is_hollow(parameter: Tensor) -> bool:
    """Return whether a parameter is still hollow, as `build` made it."""
    return parameter.untyped_storage().nbytes() < parameter.nbytes


def owned_parameters(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """List each parameter with the module that owns it, and with its name in that module."""
    return [
        (owner, name, parameter)
        for owner in model.modules()
        for name, parameter in owner.named_parameters(recurse=False)
    ]


def fill(
    model: nn.Module,
    read: Read,
    device: torch.device,
    dtype: torch.dtype | None = None,
    then: Callable[[nn.Module], object] = lambda _: None,
) -> None:
    """Load the values of every hollow parameter onto `device`.

    Args:
        model: a model of `build`, with or without adapters and quantizers.
        read: function that reads the weights.
        device: device that trains.
        dtype: type of floating-point weights after reading, or None to keep the type of `build`.
        then: function that is called with each module, after the module and its submodules are read.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for owner in reversed(list(model.modules())):  # modules inside a module come before it
        for attribute, parameter in list(owner.named_parameters(recurse=False)):
            if is_hollow(parameter):
                kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
                values = read_rows(read, names[id(parameter)], parameter.shape, kind, device)
                setattr(owner, attribute, nn.Parameter(values, parameter.requires_grad))
        then(owner)


def read_rows(
    read: Read, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device, *, rows: slice = slice(None)
) -> Tensor:
    """Load some rows of a parameter onto a device. They are read in parts, which take little host memory.

    Args:
        read: function that reads the weights.
        name: name of the parameter in the model.
        shape: shape of the whole parameter.
        dtype: type of the result.
        device: device of the result.
        rows: the rows of the first dimension to read.

    Raises:
        CheckFailed: the rows that `read` returned have another shape.
    """
    first, end, _ = rows.indices(shape[0])
    result = torch.empty((max(0, end - first), *shape[1:]), dtype=dtype, device=device)
    for part in _parts(first, end, dtype.itemsize * math.prod(shape[1:])):
        found = read(name, part)
        target = result[part.start - first : part.stop - first]
        if found.shape != target.shape:
            raise CheckFailed(f"{name}: rows {part.start} to {part.stop} have shape {list(found.shape)} on disk")
        target.copy_(found)
    return result


def _parts(first: int, end: int, row_bytes: int) -> Iterator[slice]:
    count = max(1, _PART_BYTES // row_bytes)
    for start in range(first, end, count):
        yield slice(start, min(start + count, end))
