"""Sharded training: how each engine is switched on, and one whole tensor at a time out of what it has split.

FSDP2 and ZeRO-3 give every process a part of each parameter, ZeRO-2 of the gradients and of the optimizer alone. Both
come through accelerate, by the public arguments of transformers' trainer; the settings that must agree with the
trainer's own are "auto", so that each stands in one place.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pipeline import universal
from pipeline.config import Precision, Sharding, TrainConfig
from pipeline.errors import UserError
from pipeline.tracking import is_main_process, process_count, wait_for_everyone

# DeepSpeed 0.19 calls collectives by their older names, and torch says so at every step.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)

_LAYER_CLASS = "GptOssDecoderLayer"  # what is gathered at once
_LAYER_MODULE = "transformers.models.gpt_oss.modeling_gpt_oss"
_LEAVES = {"classes": [f"{_LAYER_MODULE}.{_LAYER_CLASS}"]}  # what ZeRO-3 gathers as one, whatever is inside
_LAUNCHER_SWITCHES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def _each_whole(accelerator: Any, model: Any) -> Any:
    return accelerator.prepare_model(model, evaluation_mode=True)


def _split(accelerator: Any, model: Any) -> Any:
    # `prepare_model` would leave it whole. Its own function, by which it splits the trained model, layer by layer.
    from accelerate.utils import fsdp2_prepare_model

    return fsdp2_prepare_model(accelerator, model)


def _split_by_zero3(accelerator: Any, model: Any) -> Any:
    # accelerate splits only what it trains; without an optimizer DeepSpeed splits the parameters alone.
    import deepspeed

    trained = accelerator.state.deepspeed_plugin.deepspeed_config
    config = {
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0, "leaf_module": _LEAVES},
        "bf16": trained["bf16"],
        "train_micro_batch_size_per_gpu": 1,  # has to be there, and is of no consequence
    }
    return deepspeed.initialize(model=model, config=config)[0]


@dataclass(frozen=True)
class Engine:
    """A way to shard.

    Attributes:
        arguments: of transformers' TrainingArguments, made anew for each trainer, which changes them.
        splits: what each process has but its part of: weights, gradients, optimizer.
        gathers: whether parameters are whole only while they are used, and in memory of their own each time.
        hooks_gradients: whether it gathers a layer for its backward pass where a gradient of the layer's input is due.
        spread: (accelerator, model) -> a model that is not trained, shared as the trained one is.
        distributed_type: what accelerate is told that it is, on CPUs.
        package: that must be installed, or None.
        reading: what has to be in force while checkpoints are read that another number of processes may have written.
    """

    arguments: Callable[[], dict[str, Any]]
    splits: tuple[str, ...]
    gathers: bool
    hooks_gradients: bool = False
    spread: Callable[[Any, Any], Any] = _each_whole
    distributed_type: str = "MULTI_GPU"
    package: str | None = None
    reading: Callable[[], AbstractContextManager[None]] = nullcontext


def _fsdp2() -> dict[str, Any]:
    config = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": [_LAYER_CLASS],
        "reshard_after_forward": True,
        "state_dict_type": "SHARDED_STATE_DICT",
    }
    return {"fsdp": True, "fsdp_config": config}


def _zero(stage: int, **more: Any) -> dict[str, Any]:
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


def _zero3() -> dict[str, Any]:
    # trl 1.16 gathers the head itself, outside of the head's own forward pass, and lets go of it: if DeepSpeed, which
    # has seen it used in a validation, is fetching it ahead at that moment, it stops with "a param in flight".
    # DeepSpeed wants the parameters used in the same order in each pass. Adapters' are not, and PEFT takes a stack of
    # experts out of its module while its adapter is at work: so a layer is gathered as one, whatever is inside.
    return _zero(3, stage3_param_persistence_threshold="auto", stage3_prefetch_bucket_size=0, leaf_module=_LEAVES)


_ALL = ("weights", "gradients", "optimizer")
_DEEPSPEED: Any = {
    "distributed_type": "DEEPSPEED",
    "package": "deepspeed",
    "reading": universal.read_where_needed,
}
ENGINES = {
    Sharding.none: Engine(dict, splits=(), gathers=False, distributed_type="MULTI_CPU"),
    Sharding.fsdp2: Engine(_fsdp2, splits=_ALL, gathers=True, spread=_split),
    Sharding.zero2: Engine(lambda: _zero(2), splits=_ALL[1:], gathers=False, **_DEEPSPEED),
    Sharding.zero3: Engine(
        _zero3, splits=_ALL, gathers=True, hooks_gradients=True, spread=_split_by_zero3, **_DEEPSPEED
    ),
}


@contextmanager
def switched_on(sharding: Sharding) -> Iterator[dict[str, Any]]:
    """What transformers' TrainingArguments need for it, while one model is trained."""
    made = ENGINES[sharding].arguments()
    if process_count() > 1 and not torch.cuda.is_available():
        made.update(_on_cpu(sharding))
    try:
        with ENGINES[sharding].reading():
            yield made
    finally:
        _forget_switches()


def _forget_switches() -> None:
    """Where accelerate and transformers remember how the trainer shards, and the next stage would find it."""
    from transformers.integrations import unset_hf_deepspeed_config

    for name in _LAUNCHER_SWITCHES:
        os.environ.pop(name, None)
    unset_hf_deepspeed_config()  # else it would load the next model in pieces


def raise_if_impossible(sharding: Sharding) -> None:
    """Check early that training can be shared so.

    `accelerate launch` hands a configuration of its own over by the environment, which the trainer would take up.

    Raises:
        UserError: there is only one process, a package is missing, or the launcher brings a setup of its own.
    """
    switches = [name for name in _LAUNCHER_SWITCHES if os.environ.get(name) == "true"]
    if switches:
        raise UserError(
            f"sharding={sharding.name}: the launcher sets {', '.join(switches)} as well. Say how to shard in one place:"
            " leave it out of accelerate's configuration (scripts/accelerate has one) and keep sharding=."
        )
    package = ENGINES[sharding].package
    if package is not None and find_spec(package) is None:
        raise UserError(f"sharding={sharding.name}: needs {package}. Install it: pip install 'gpt-oss-qat[{package}]'.")
    if sharding is not Sharding.none and process_count() < 2:
        raise UserError(
            f"sharding={sharding.name}: there is one process, and nothing to share among. Start several with"
            " scripts/launch, torchrun or accelerate launch, or use sharding=none."
        )


def _on_cpu(sharding: Sharding) -> dict[str, Any]:
    """accelerate shards where it sees several GPUs; told that it does, it shards over gloo as well."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    wait_for_everyone()  # makes the process group
    AcceleratorState._reset_state()  # of an earlier stage in this process
    state = PartialState()
    state.distributed_type = DistributedType[ENGINES[sharding].distributed_type]
    state.device = torch.device("cpu")  # accelerate's own, cpu:0, is none that torch can load a checkpoint to
    return {"accelerator_config": {"use_configured_state": True}}


def saved_dtype(train: TrainConfig, dtype: torch.dtype, sharding: Sharding) -> torch.dtype:
    """Type of the weights that the forward pass computes with, and that are saved.

    Engines cast parameters to BF16 before they gather them, so that under mixed_bf16 the quantizers round BF16 values:
    those are the trained model. The FP32 ones are kept only by the optimizer and the checkpoints to resume from.

    Args:
        train: of the stage.
        dtype: type of the weights in the memory of one process.
        sharding: how they are split.
    """
    casts = sharding is not Sharding.none and train.precision is Precision.mixed_bf16
    return torch.bfloat16 if casts else dtype


@contextmanager
def gathered(parameter: Tensor) -> Iterator[Tensor]:
    """The whole of a parameter, on every process; for all of them to enter together, in the same order.

    Gradients reach the parameter through it unless `is_kept_from_gradients`.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    elif hasattr(parameter, "ds_id"):  # how DeepSpeed itself marks what it has split
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameter):
            yield parameter.data
    else:
        yield parameter


def is_kept_from_gradients(parameter: Tensor) -> bool:
    """Whether a parameter gets its gradient from the forward pass of its own module alone: one that ZeRO-3 trains."""
    return parameter.requires_grad and hasattr(parameter, "ds_id")


def first_part(parameter: Tensor) -> Tensor:
    """What the main process holds of a parameter: a sharded one's first rows; on other processes no rows of it."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local() if is_main_process() else parameter.to_local()[:0]


def let_go(model: Any) -> None:
    """Give back what FSDP2 keeps whole after a forward pass without a backward one: norm and head, once validated."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
