"""Shard models with torch's FSDP2, fill the shards from disk, and set the types in which FSDP2 computes.

accelerate 1.15 shards a model only when training starts. Until then, every process would hold the whole model.
accelerate would also cast the output of each layer to BF16. But accelerate does not change a model that is already
sharded, so this module shards models before accelerate gets them.
"""

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pipeline.checkpoints.gpt_oss import DECODER_LAYER_CLASS
from pipeline.errors import CheckFailed
from pipeline.models import streaming
from pipeline.models.streaming import Read
from pipeline.runs.processes import wait_for_everyone

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


def policy(mixed: bool, output_dtype: torch.dtype | None = None) -> MixedPrecisionPolicy:
    """Return the types in which FSDP2 gathers parameters and reduces gradients.

    Gradients are summed over the processes in FP32. The inputs and outputs of layers are not cast, so the residual
    stream has the same type as on one device under autocast.

    Args:
        mixed: whether parameters are stored in FP32 and gathered in BF16.
        output_dtype: type to which the outputs of a module are cast, or None.
    """
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if mixed else None,
        reduce_dtype=torch.float32,
        output_dtype=output_dtype,
        cast_forward_inputs=False,
    )


def load_shards(model: nn.Module, read: Read, mixed: bool, device: torch.device) -> None:
    """Shard a model in place, and read the shard of this process. This is a collective call.

    Args:
        model: a model of `streaming.build`, with its adapters and quantizers.
        read: function that reads the weights.
        mixed: whether training is in mixed precision.
        device: device that trains.
    """
    wait_for_everyone()  # creates the process group
    for owner, attribute, parameter in streaming.owned_parameters(model):
        if streaming.is_hollow(parameter):
            empty = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
            setattr(owner, attribute, empty)
    shard(model, mixed)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for owner, attribute, parameter in streaming.owned_parameters(model):
        if parameter.is_meta:
            assert isinstance(parameter, DTensor)
            setattr(owner, attribute, _read_shard(names[id(parameter)], parameter, read, device))


def correct_preparation(accelerator: "Accelerator") -> None:
    """Correct how accelerate 1.15 prepares a sharded model and its optimizer.

    - accelerate replaces each parameter of the optimizer by the model's parameter at the same address. If a process
      holds no rows of a parameter, the address is 0. So all such parameters would be replaced by the same parameter.
      The correction keeps the optimizer's parameters, which are right because the model was sharded before.
    - accelerate does not use autocast for a model that FSDP2 shards. The correction switches autocast on.
    """
    prepare = accelerator.prepare

    def prepare_correctly(*objects: object, **more: object) -> object:
        optimizers = [each for each in objects if isinstance(each, Optimizer)]
        before = [list(group["params"]) for each in optimizers for group in each.param_groups]
        result = prepare(*objects, **more)
        after = [group for each in optimizers for group in each.param_groups]  # prepare() makes new dicts
        for group, parameters in zip(after, before, strict=True):
            group["params"] = parameters
        for model in objects:
            if isinstance(model, FSDPModule) and accelerator.mixed_precision == "bf16":
                _use_autocast(model, accelerator.device.type)
        return result

    accelerator.prepare = prepare_correctly


def _use_autocast(model: Any, device_type: str) -> None:
    from accelerate.utils import convert_outputs_to_fp32

    model.forward = convert_outputs_to_fp32(torch.autocast(device_type, torch.bfloat16)(model.forward))


def shard(model: nn.Module, mixed: bool) -> None:
    """Shard a model in place.

    Each decoder layer is a unit. The embedding is another unit. The final norm and the head are one unit together.
    accelerate 1.15 uses the same units. The embedding's output is FP32 under mixed precision, as on one device.
    """
    plain = _plain(model)
    for module in plain.modules():
        if type(module).__name__ == DECODER_LAYER_CLASS:
            fully_shard(module, mp_policy=policy(mixed), reshard_after_forward=True)
    embedding, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    fully_shard(embedding, mp_policy=policy(mixed, torch.float32 if mixed else None), reshard_after_forward=True)
    # The head stays gathered after the forward pass, because the backward pass begins with it.
    fully_shard([plain.model.norm, head], mp_policy=policy(mixed), reshard_after_forward=False)
    fully_shard(model, mp_policy=policy(mixed))


def set_gathers(model: nn.Module, keeps_gathered: bool) -> None:
    """Set when a sharded model gathers and frees its parameters in training. Do nothing if the model is not sharded.

    - The embedding is gathered only for the forward pass. The gradient of an embedding does not need its weights.
    - The last layer stays gathered until its backward pass. Otherwise FSDP2 would free the layer, and would gather it
      again during the backward pass of the head.
    - In the forward pass, each unit begins the gather of the next unit before it computes. By itself, FSDP2 begins a
      gather when the host reaches the unit. This is too late if a layer makes the host wait for the GPU, as some
      kernels of the experts do. In the backward pass, FSDP2 itself begins the next gather before a unit computes.

    Args:
        model: a model of `shard`, not a teacher.
        keeps_gathered: whether all layers stay gathered until their backward pass. A layer is then gathered for its
            forward pass, and not again for its backward pass. After the forward pass, the whole model is in memory.
    """
    if not isinstance(model, FSDPModule):
        return
    plain: Any = _plain(model)  # its modules are FSDPModules too
    layers = [module for module in plain.modules() if type(module).__name__.endswith(DECODER_LAYER_CLASS)]
    embedding, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    embedding.set_unshard_in_backward(False)
    for layer in layers if keeps_gathered else layers[-1:]:
        layer.set_reshard_after_forward(False, recurse=False)
    for unit, following in pairwise([embedding, *layers, head]):
        unit.set_modules_to_forward_prefetch([following])


def _plain(model: nn.Module) -> "PreTrainedModel":
    """Return the model without PEFT's wrapper."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped


def _read_shard(name: str, parameter: DTensor, read: Read, device: torch.device) -> nn.Parameter:
    """Read this process's rows of a parameter.

    FSDP2 gives every process the same number of rows, except that the last processes can get fewer.
    """
    mesh = parameter.device_mesh
    length = math.ceil(parameter.shape[0] / mesh.size())
    first = min(length * mesh.get_local_rank(), parameter.shape[0])
    rows = slice(first, min(first + length, parameter.shape[0]))
    if rows.stop - rows.start != parameter.to_local().shape[0]:
        raise CheckFailed(f"{name}: FSDP2 gives this process {parameter.to_local().shape[0]} rows, not {rows}")
    local = streaming.read_rows(read, name, parameter.shape, parameter.dtype, device, rows=rows)
    whole = DTensor.from_local(
        local, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)
