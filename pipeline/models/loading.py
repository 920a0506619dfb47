"""Load models into memory: plain, with adapters and quantizers, for training, or for evaluation."""

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from pipeline.checkpoints.config_json import read_config
from pipeline.checkpoints.dtypes import TRAIN_TYPES, torch_dtype
from pipeline.config import Device, TrainConfig
from pipeline.errors import CheckFailed, UserError
from pipeline.models.references import ModelRef
from pipeline.models.weights import Weights
from pipeline.numerics.formats import BlockFormat
from pipeline.runs.console import shows_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)

TRAIN_DTYPES = {precision: torch_dtype(name) for precision, name in TRAIN_TYPES.items()}
"""Type of the weights during training, for each training precision."""

_ROOM = 1.3  # memory that a forward pass needs, weights included, as a multiple of the weights' size


def device_of(asked: Device) -> str:
    """Return the device for conversions, `cpu` or `cuda`.

    Raises:
        UserError: the configuration asks for a GPU, but there is none.
    """
    has_gpu = torch.cuda.is_available()
    if asked is Device.cuda and not has_gpu:
        raise UserError("device=cuda: no GPU is visible here. Use device=auto or device=cpu.")
    return "cuda" if has_gpu and asked is not Device.cpu else "cpu"


def _quieten() -> None:
    """Silence transformers' progress bars if there is no terminal, and its warnings that MXFP4 kernels are missing."""
    from transformers.utils import logging

    if not shows_progress():
        logging.disable_progress_bar()
    logging.get_logger("transformers.quantizers.quantizer_mxfp4").setLevel(logging.ERROR)


def load_plain(directory: Path, dtype: torch.dtype, **arguments: Any) -> "PreTrainedModel":
    """Load a checkpoint with transformers, and decode MXFP4 weights.

    Raises:
        CheckFailed: a tensor is missing, unexpected or has the wrong shape. (transformers only prints this.)
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    _quieten()
    if "quantization_config" in read_config(directory):
        arguments["quantization_config"] = Mxfp4Config(dequantize=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, output_loading_info=True, **{"attn_implementation": "eager", **arguments}
    )
    model, info = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise CheckFailed(f"{directory}: transformers could not load every tensor: {wrong}")
    for parameter in model.parameters():  # transformers 5.14 leaves decoded experts in BF16, whatever the dtype
        parameter.data = parameter.data.to(dtype)
    return model


def load_quantized(
    ref: ModelRef, dtype: torch.dtype, trainable: bool = False, **arguments: object
) -> "PreTrainedModel":
    """Load a model with its adapters and its fake quantizers. The quantizers are checked."""
    model = load_plain(ref.base, dtype, **arguments)
    if ref.adapter:
        from pipeline.models import adapters

        model = adapters.load(model, ref.directory, trainable)
    if ref.block_format is not None:
        from pipeline.models import fake_quantizers

        fake_quantizers.restore(model, ref.directory, ref.block_format)
    return model


def load_to_train(ref: ModelRef, train: TrainConfig) -> "PreTrainedModel":
    """Load a model for training, with the adapters and quantizers of `ref`, in `train.precision`."""
    model = load_quantized(
        ref,
        TRAIN_DTYPES[train.precision],
        trainable=True,
        attn_implementation=train.attn_implementation,
    )
    set_up_to_train(model, train, ref.block_format)
    return model


def set_up_to_train(model: "PreTrainedModel", train: TrainConfig, block_format: BlockFormat | None) -> None:
    """Set the experts' kernel and the attention masks that training needs.

    Args:
        model: a model with its final quantizers.
        train: settings of the stage.
        block_format: format of the quantizers, or None if there are none.
    """
    from pipeline.models import expert_kernels, packing_masks
    from pipeline.models.adapters import base_of

    expert_kernels.use(model, train.experts_implementation, block_format)
    model.config.use_cache = False
    if train.packing:
        packing_masks.mask_documents(base_of(model))


def load_effective(ref: ModelRef, dtype: torch.dtype, **arguments: Any) -> "PreTrainedModel":
    """Load a plain model that computes the same as `ref`, with merged adapters and rounded experts.

    If inputs are quantized too, the model keeps its adapters and quantizers instead.
    """
    if ref.block_format is not None and ref.block_format.quantizes_activations:
        return place(load_quantized(ref, dtype, **arguments)).eval()
    model = load_plain(ref.base, dtype, **arguments)
    weights = Weights(ref)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if weights.is_changed(name):
                parameter.copy_(weights.read_effective(name))
    return place(model).eval()


def place(model: Model) -> Model:
    """Move the model to the GPU if a GPU with enough free memory exists."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()  # otherwise the memory of an earlier model counts as used
        needed = sum(parameter.nbytes for parameter in model.parameters())
        if torch.cuda.mem_get_info()[0] > _ROOM * needed:
            return model.to("cuda")
    return model
