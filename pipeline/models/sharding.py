"""Switch on sharded training with FSDP2 or DeepSpeed's ZeRO, and gather sharded tensors.

FSDP2 and ZeRO-3 shard parameters, gradients and optimizer states. ZeRO-2 shards only gradients and optimizer states.
accelerate sets up the sharding, through public arguments of transformers' trainer. Some settings of DeepSpeed must
equal settings of the trainer. They have the value "auto" here, and the trainer fills in its own values.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.checkpoints.gpt_oss import DECODER_LAYER_CLASS, MODELING_MODULE
from pipeline.config import Precision, Sharding, TrainConfig
from pipeline.errors import UserError
from pipeline.models import streaming, zero_checkpoints
from pipeline.models.streaming import Read
from pipeline.runs.processes import is_main_process, process_count, wait_for_everyone

if TYPE_CHECKING:
    from accelerate import Accelerator

_LEAVES = {"classes": [f"{MODELING_MODULE}.{DECODER_LAYER_CLASS}"]}  # ZeRO-3 gathers each of these modules as a whole
_LAUNCHER_SWITCHES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def _replicate(accelerator: "Accelerator", model: nn.Module) -> nn.Module:
    return accelerator.prepare_model(model, evaluation_mode=True)


def _keep(_: "Accelerator", model: nn.Module) -> nn.Module:
    return model


def own_device() -> torch.device:
    """Return the device on which this process trains: the GPU with its local rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    wait_for_everyone()  # the first call selects this process's GPU
    return torch.device("cuda", torch.cuda.current_device())


def _load_whole(model: nn.Module, read: Read, _: bool) -> None:
    streaming.fill(model, read, own_device())
    model.to(own_device())


def _load_for_zero2(model: nn.Module, read: Read, mixed: bool) -> None:
    # DeepSpeed would itself cast the whole model to BF16, but later. Until then, FP32 weights would take twice the
    # memory.
    streaming.fill(model, read, own_device(), torch.bfloat16 if mixed else None)
    model.to(own_device())


def _load_zero3_shards(model: nn.Module, read: Read, mixed: bool) -> None:
    """Read the parameters module by module, and let DeepSpeed keep only this process's share of each."""
    import deepspeed

    wait_for_everyone()  # creates the process group
    config = _zero3_of_parameters({"enabled": mixed})

    def shard(module: nn.Module) -> None:
        if next(module.parameters(recurse=False), None) is not None:
            deepspeed.zero.Init(module=module, config_dict_or_path=config)

    streaming.fill(model, read, own_device(), torch.bfloat16 if mixed else None, shard)


def _zero3_of_parameters(bf16: object) -> dict[str, object]:
    return {
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0, "leaf_module": _LEAVES},
        "bf16": bf16,
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed requires the key but does not use it here
    }


def _load_fsdp2_shards(model: nn.Module, read: Read, mixed: bool) -> None:
    from pipeline.models import fsdp2

    fsdp2.load_shards(model, read, mixed, own_device())


def _correct_fsdp2(accelerator: "Accelerator") -> None:
    from pipeline.models import fsdp2

    fsdp2.correct_preparation(accelerator)


def _set_fsdp2_gathers(model: nn.Module, train: TrainConfig) -> None:
    from pipeline.models import fsdp2

    fsdp2.set_gathers(model, keeps_gathered=not train.reshard_after_forward)


def _do_nothing(*_: object) -> None:
    pass


def _shard_by_zero3(accelerator: "Accelerator", model: nn.Module) -> nn.Module:
    # accelerate does not shard a frozen model, so DeepSpeed is called here. There is no optimizer, so DeepSpeed shards
    # only the parameters.
    import deepspeed

    config = _zero3_of_parameters(accelerator.state.deepspeed_plugin.deepspeed_config["bf16"])
    return deepspeed.initialize(model=model, config=config)[0]


@dataclass(frozen=True)
class ShardingStrategy:
    """One way to shard a model.

    Attributes:
        arguments: function that returns arguments for transformers' TrainingArguments. Each call returns a new dict,
            because the trainer changes the dict.
        sharded: what the strategy shards. The possible names are "weights", "gradients" and "optimizer".
        gathers: whether parameters are gathered only while they are used. Each gather is a new allocation.
        place: function that loads the weights of a hollow model onto the training device. If the strategy shards
            weights, each process keeps only its shard. The function has three arguments: the model, a function that
            reads rows of a weight, and a flag for mixed precision.
        set_gathers: function to call before training. It controls when the model gathers and frees parameters.
        correct: function that corrects errors of accelerate for this strategy. Call it before the model is prepared.
        hooks_gradients: True if the backward pass gathers a layer only when the layer's input needs a gradient.
        shard_frozen: function that prepares a frozen model, such as a teacher, after `place` has loaded it.
        distributed_type: name of accelerate's DistributedType for training on CPUs.
        package: package that must be installed, or None.
        checkpoints: context manager in which checkpoints are read and written.
    """

    arguments: Callable[[], dict[str, object]]
    sharded: tuple[str, ...]
    gathers: bool
    place: Callable[[nn.Module, Read, bool], None] = _load_whole
    set_gathers: Callable[[nn.Module, TrainConfig], None] = _do_nothing
    correct: Callable[["Accelerator"], None] = _do_nothing
    hooks_gradients: bool = False
    shard_frozen: Callable[["Accelerator", nn.Module], nn.Module] = _replicate
    distributed_type: str = "MULTI_GPU"
    package: str | None = None
    checkpoints: Callable[[], AbstractContextManager[None]] = nullcontext


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the first failed process's own error in place of torch's CheckpointException.

    torch 2.13 raises it if a sharded checkpoint cannot be written. It is a BaseException, so it would be taken for the
    end of the program, and its text is the traceback of another process.
    """
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


def _fsdp2() -> dict[str, object]:
    config = {
        "version": 2,
        "auto_wrap_policy": "NO_WRAP",  # models/fsdp2.py has already sharded the model
        "reshard_after_forward": True,
        "state_dict_type": "SHARDED_STATE_DICT",
    }
    return {"fsdp": True, "fsdp_config": config, "accelerator_config": _sync_each_pass()}


def _sync_each_pass() -> dict[str, object]:
    # By default, transformers reduces gradients only in the last pass of an optimizer step. Until then, every process
    # would hold the FP32 gradients of the whole model.
    return {"gradient_accumulation_kwargs": {"sync_each_batch": True}}


def _zero(stage: int, **more: object) -> dict[str, object]:
    config = {
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            "reduce_bucket_size": "auto",
            **more,
        },
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
    }
    return {"deepspeed": config}


def _zero3() -> dict[str, object]:
    # Prefetching is off, because trl 1.16 gathers and releases the head outside of the head's own forward pass. If a
    # validation has used the head, DeepSpeed may be prefetching the head at that moment. DeepSpeed then stops with "a
    # param in flight".
    # DeepSpeed expects the same order of parameters in each pass. But adapters use their parameters in varying order,
    # and PEFT removes an expert stack from its module while the adapter runs. So each layer is gathered as a whole.
    return _zero(3, stage3_param_persistence_threshold="auto", stage3_prefetch_bucket_size=0, leaf_module=_LEAVES)


_ALL = ("weights", "gradients", "optimizer")
_DEEPSPEED: Any = {
    "distributed_type": "DEEPSPEED",
    "package": "deepspeed",
    "checkpoints": zero_checkpoints.convert_when_needed,
}
STRATEGIES = {
    Sharding.none: ShardingStrategy(dict, sharded=(), gathers=False, distributed_type="MULTI_CPU"),
    Sharding.fsdp2: ShardingStrategy(
        _fsdp2,
        sharded=_ALL,
        gathers=True,
        place=_load_fsdp2_shards,
        set_gathers=_set_fsdp2_gathers,
        correct=_correct_fsdp2,
        shard_frozen=_keep,
        checkpoints=_plain_errors,
    ),
    Sharding.zero2: ShardingStrategy(
        lambda: _zero(2), sharded=_ALL[1:], gathers=False, place=_load_for_zero2, **_DEEPSPEED
    ),
    Sharding.zero3: ShardingStrategy(
        _zero3,
        sharded=_ALL,
        gathers=True,
        place=_load_zero3_shards,
        hooks_gradients=True,
        shard_frozen=_shard_by_zero3,
        **_DEEPSPEED,
    ),
}


@contextmanager
def switch_on(sharding: Sharding) -> Iterator[dict[str, object]]:
    """Yield arguments for transformers' TrainingArguments. Use them only inside the block, for one model."""
    arguments = STRATEGIES[sharding].arguments()
    if process_count() > 1 and not torch.cuda.is_available():
        _shard_on_cpu(sharding)
        given = arguments.get("accelerator_config", {})
        assert isinstance(given, dict)
        arguments["accelerator_config"] = {**given, "use_configured_state": True}
    try:
        with STRATEGIES[sharding].checkpoints():
            yield arguments
    finally:
        _forget_switches()


def _forget_switches() -> None:
    """Clear the sharding that accelerate and transformers store globally, so that the next stage does not use it."""
    from transformers.integrations import unset_hf_deepspeed_config

    for name in _LAUNCHER_SWITCHES:
        os.environ.pop(name, None)
    unset_hf_deepspeed_config()  # otherwise transformers would shard the next model while loading it


def raise_if_impossible(sharding: Sharding) -> None:
    """Check, before work begins, that training can be sharded this way.

    `accelerate launch` can pass its own sharding settings through environment variables. The trainer would obey
    these settings too.

    Raises:
        UserError: there is only one process, a package is missing, or the launcher sets up sharding too.
    """
    switches = [name for name in _LAUNCHER_SWITCHES if os.environ.get(name) == "true"]
    if switches:
        raise UserError(
            f"sharding={sharding.name}: the launcher sets {', '.join(switches)} as well. Remove sharding from"
            " accelerate's configuration (scripts/accelerate has an example) and keep sharding=."
        )
    package = STRATEGIES[sharding].package
    if package is not None and find_spec(package) is None:
        raise UserError(f"sharding={sharding.name}: needs {package}. Install it: pip install 'gpt-oss-qat[{package}]'.")
    if sharding is not Sharding.none and process_count() < 2:
        raise UserError(
            f"sharding={sharding.name}: needs several processes, but there is only one. Start several with"
            " scripts/launch, torchrun or accelerate launch, or use sharding=none."
        )


def _shard_on_cpu(sharding: Sharding) -> None:
    """Set accelerate's state so that accelerate shards on CPUs, over gloo.

    By default accelerate shards only on several GPUs.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    wait_for_everyone()  # creates the process group
    AcceleratorState._reset_state()  # an earlier stage in this process may have left a state
    state = PartialState()
    state.distributed_type = DistributedType[STRATEGIES[sharding].distributed_type]
    state.device = torch.device("cpu")  # torch cannot load a checkpoint to cpu:0, accelerate's default


def saved_dtype(train: TrainConfig, dtype: torch.dtype, sharding: Sharding) -> torch.dtype:
    """Return the type of the weights in the forward pass. Weights are also saved in this type.

    Under mixed_bf16, sharding casts parameters to BF16 before they are gathered. So the quantizers round BF16 values,
    and the BF16 values are the trained model. Only the optimizer and the checkpoints for resuming keep FP32 values.

    Args:
        train: settings of the stage.
        dtype: type in which a process stores its weights.
        sharding: how the weights are sharded.
    """
    casts = sharding is not Sharding.none and train.precision is Precision.mixed_bf16
    return torch.bfloat16 if casts else dtype


@contextmanager
def gather(parameter: Tensor) -> Iterator[Tensor]:
    """Yield the whole parameter on every process. All processes must make this collective call in the same order.

    Gradients flow from the result to the parameter, unless `is_kept_from_gradients(parameter)`.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    elif hasattr(parameter, "ds_id"):  # DeepSpeed marks sharded parameters with this attribute
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameter):
            yield parameter.data
    else:
        yield parameter


@contextmanager
def own_part(parameter: Tensor) -> Iterator[Tensor]:
    """Yield this process's own rows of a parameter. They may be changed in place. This is a collective call.

    The result is a view, and it may be empty. A shard of ZeRO-3 does not consist of rows. So under ZeRO-3 the main
    process gets all rows, and the other processes get none. DeepSpeed then copies the main process's changes to the
    other processes.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        yield parameter.to_local()
    elif hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            yield parameter.data if is_main_process() else parameter.data[:0]
    else:
        yield parameter.data


def is_kept_from_gradients(parameter: Tensor) -> bool:
    """Return whether gradients reach a parameter only through its own module. This is the case under ZeRO-3."""
    return parameter.requires_grad and hasattr(parameter, "ds_id")


def first_part(parameter: Tensor) -> Tensor:
    """Return a parameter. If it is sharded, return its first rows on the main process, and no rows on the others."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local() if is_main_process() else parameter.to_local()[:0]


def reshard(model: nn.Module) -> None:
    """Reshard all parameters. After a forward pass, FSDP2 keeps some gathered until the next backward pass."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
