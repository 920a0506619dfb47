"""Load models into memory: plain models, models with adapters and quantizers, models to train or to evaluate."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.checkpoints.config_json import is_quantized, read_config
from pipeline.checkpoints.dtypes import TRAIN_TYPES, torch_dtype
from pipeline.checkpoints.gpt_oss import EXPERT_WEIGHTS, PACKED_SUFFIXES, SCALES_SUFFIX, packed_names
from pipeline.checkpoints.reading import Checkpoint
from pipeline.config import Device, Method, Precision, Sharding, TrainConfig
from pipeline.errors import CheckFailed, UserError
from pipeline.models import sharding, streaming
from pipeline.models.adapted_names import parameter_name
from pipeline.models.placement import place
from pipeline.models.references import ModelRef
from pipeline.models.weights import Weights
from pipeline.numerics.codec import encode
from pipeline.numerics.formats import MXFP4, BlockFormat
from pipeline.runs.console import shows_progress
from pipeline.runs.preflight import NO_GPU

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Attach = Callable[["PreTrainedModel"], "PreTrainedModel"]

TRAIN_DTYPES = {precision: torch_dtype(name) for precision, name in TRAIN_TYPES.items()}
"""Type of the weights during training, for each training precision."""


def device_of(asked: Device) -> str:
    """Return the device for conversions, `cpu` or `cuda`.

    Raises:
        UserError: the configuration asks for a GPU, but there is none.
    """
    has_gpu = torch.cuda.is_available()
    if asked is Device.cuda and not has_gpu:
        raise UserError(NO_GPU)
    return "cuda" if has_gpu and asked is not Device.cpu else "cpu"


def _quieten() -> None:
    """Without a terminal, hide transformers' progress bars."""
    from transformers.utils import logging

    if not shows_progress():
        logging.disable_progress_bar()


def load_plain(directory: Path, dtype: torch.dtype, **arguments: Any) -> "PreTrainedModel":
    """Load a checkpoint with transformers, and decode MXFP4 weights.

    Raises:
        CheckFailed: a tensor is missing, unexpected or has the wrong shape. (transformers itself only prints a report.)
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    from pipeline.models import sink_attention  # noqa: F401 (registers the attention in transformers)

    _quieten()
    config = arguments.pop("config", None) or AutoConfig.from_pretrained(directory)
    if is_quantized(read_config(directory)):
        arguments["quantization_config"] = Mxfp4Config(dequantize=True)
    elif hasattr(config, "quantization_config"):
        del config.quantization_config  # left over from another model, as `source.locate` reports
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=dtype, output_loading_info=True, **{"attn_implementation": "eager", **arguments}
    )
    model, info = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise CheckFailed(f"{directory}: transformers could not load every tensor: {wrong}")
    for parameter in model.parameters():  # transformers 5.14 leaves decoded experts in BF16, whatever the dtype
        parameter.data = parameter.data.to(dtype)
    return model


def load_packed(directory: Path, dtype: torch.dtype, **arguments: Any) -> "PreTrainedModel":
    """Load an MXFP4 checkpoint into host memory. The experts stay packed."""
    _quieten()
    model = _build(directory, dtype, packed=True, **{"attn_implementation": "eager", **arguments})
    checkpoint = Checkpoint(directory)
    streaming.fill(model, partial(_read_packed, checkpoint), torch.device("cpu"))
    checkpoint.close()
    return model


def _build(
    directory: Path, dtype: torch.dtype, *, packed: bool, mixed: bool = False, **arguments: Any
) -> "PreTrainedModel":
    """Build a model without values, for `streaming`. Its experts are packed or plain.

    `mixed` says whether packed experts compute in BF16, whatever the type of their biases.
    """
    from pipeline.models import packed_experts

    computes_in = torch.bfloat16 if mixed else dtype
    pack = partial(packed_experts.replace, dtype=dtype, computes_in=computes_in) if packed else None
    return streaming.build(directory, dtype, pack, **arguments)


def _read_plain(checkpoint: Checkpoint, name: str, rows: slice) -> torch.Tensor:
    """Read rows of a model's parameter. MXFP4 is decoded."""
    return checkpoint.read_plain(parameter_name(name), rows=rows)


def _read_packed(checkpoint: Checkpoint, name: str, rows: slice) -> torch.Tensor:
    """Read rows of a parameter. The experts of the model are packed.

    The blocks of the experts have the name of the plain weights.
    """
    name = parameter_name(name)
    if not name.endswith((*EXPERT_WEIGHTS, *PACKED_SUFFIXES)):
        return checkpoint.read_plain(name, rows=rows)
    if name.endswith(EXPERT_WEIGHTS):
        return checkpoint.read(packed_names(name)[0], rows)
    scales = checkpoint.read(name, rows)
    checkpoint.raise_if_nan(name.removesuffix(SCALES_SUFFIX), scales, rows)
    return scales


def load_quantized(
    ref: ModelRef, dtype: torch.dtype, trainable: bool = False, **arguments: object
) -> "PreTrainedModel":
    """Load a model with its adapters and fake quantizers, and check the quantizers. Packed experts stay packed."""
    load = load_packed if ref.is_packed else load_plain
    return _restore_parts(load(ref.base, dtype, **arguments), ref, trainable)


def _restore_parts(model: "PreTrainedModel", ref: ModelRef, trainable: bool) -> "PreTrainedModel":
    """Add the adapters and the fake quantizers of `ref` to its base model."""
    if ref.adapter:
        from pipeline.models import adapters

        is_factored = trainable and ref.block_format is None  # as when they were attached
        model = adapters.load(model, ref.directory, trainable, is_factored=is_factored)
    if ref.block_format is not None:
        from pipeline.models import fake_quantizers

        fake_quantizers.restore(model, ref.directory, ref.block_format)
    return model


def load_to_train(
    ref: ModelRef,
    train: TrainConfig,
    attn_implementation: str,
    shared: Sharding = Sharding.none,
    attach: Attach | None = None,
) -> "PreTrainedModel":
    """Load `ref` for training in `train.precision`, with its adapters and quantizers.

    If adapters are not trained, they are merged into the weights.

    This is a collective call if the model is sharded. The weights are streamed to the device that trains, so the host
    holds no copy of the model. Packed experts are decoded only if they are trained.

    Args:
        ref: the model.
        train: settings of the stage.
        attn_implementation: the attention that `attention_check.check` chose.
        shared: how the model is sharded.
        attach: function that attaches new adapters, or None.
    """
    _quieten()
    packed, mixed = ref.is_packed and train.method is not Method.full, is_mixed(train)
    dtype = TRAIN_DTYPES[train.precision]
    model = _build(ref.base, dtype, packed=packed, mixed=mixed, attn_implementation=attn_implementation)
    merges = ref.adapter and train.method is not Method.lora
    model = _restore_parts(model, replace(ref, adapter=False) if merges else ref, trainable=True)
    model = model if attach is None else attach(model)
    if train.method is Method.bf16_parts:
        freeze_experts(model)
    checkpoint = Checkpoint(ref.base)
    read = Weights(ref).read_rows if merges else partial(_read_packed if packed else _read_plain, checkpoint)
    sharding.STRATEGIES[shared].place(model, read, mixed)
    checkpoint.close()
    set_up_to_train(model, train, ref.block_format)
    return model


def freeze_experts(model: "PreTrainedModel") -> None:
    """Freeze the experts' weights, packed or not. Their biases stay trainable."""
    for name, parameter in model.named_parameters():
        if name.endswith(EXPERT_WEIGHTS):
            parameter.requires_grad_(False)


def set_up_to_train(model: "PreTrainedModel", train: TrainConfig, block_format: BlockFormat | None) -> None:
    """Set the experts' kernel and the attention masks that training needs. A teacher needs them too.

    Args:
        model: a model with its final adapters and quantizers.
        train: settings of the stage.
        block_format: format of the quantizers, or None if there are none.
    """
    from pipeline.models import expert_kernels, packing_masks
    from pipeline.models.adapters import base_of

    expert_kernels.use(model, train.experts_implementation, block_format, train.precision)
    model.config.use_cache = False
    if train.packing:
        packing_masks.mask_documents(base_of(model))


def is_mixed(train: TrainConfig) -> bool:
    """Return whether training keeps FP32 weights and computes in BF16."""
    return train.precision is Precision.mixed_bf16


def load_teacher(ref: ModelRef, train: TrainConfig, shared: Sharding, attn_implementation: str) -> "PreTrainedModel":
    """Load a frozen model that gives the same results as `ref`. It is sharded like the model in training.

    This is a collective call if the model is sharded.
    """
    _quieten()
    model = streaming.build(ref.base, ref.dtype, attn_implementation=attn_implementation).requires_grad_(False)
    weights = Weights(ref)
    sharding.STRATEGIES[shared].place(model, weights.read_rows, is_mixed(train))
    set_up_to_train(model, train, None)
    return model


def load_effective(ref: ModelRef, dtype: torch.dtype, spread: bool = False, **arguments: Any) -> "PreTrainedModel":
    """Load a model that gives the same results as `ref`, with merged adapters and rounded experts.

    If inputs are quantized too, the model keeps its adapters and quantizers instead. Such a model is placed on one
    device. If the experts of `ref` are packed, see `_load_effective_packed`.

    Args:
        ref: the model.
        dtype: type of the weights.
        spread: whether a model that does not fit on one GPU may be spread over all of them.
        arguments: further arguments of transformers' `from_pretrained`.
    """
    if ref.block_format is not None and ref.block_format.quantizes_activations:
        return place(load_quantized(ref, dtype, **arguments)).eval()
    if ref.is_packed:
        arguments.pop("experts_implementation", None)
        return place(_load_effective_packed(ref, dtype, **arguments), spread).eval()
    model = load_plain(ref.base, dtype, **arguments)
    weights = Weights(ref)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for rows in weights.parts(name) if weights.is_changed(name) else ():
                parameter[rows].copy_(weights.read_effective(name, rows))
    return place(model, spread).eval()


def load_rounded_packed(ref: ModelRef, dtype: torch.dtype) -> "PreTrainedModel":
    """Load a model that gives the same results as `ref`, and pack its experts, although the base has plain ones.

    The experts must be rounded to MXFP4. This takes about a third of the memory of `load_effective`.
    """
    model = _build(ref.base, dtype, packed=True, attn_implementation="eager")
    streaming.fill(model, _Rounded(Weights(ref)), torch.device("cpu"))
    return model.eval()


class _Rounded:
    """Reads rows of a parameter as `_read_packed` does, but rounds the experts.

    A stack is read once: its blocks are read before its scales, as `PackedExperts` has them in this order.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._scales: dict[str, list[torch.Tensor]] = {}  # of the experts whose blocks have been read

    def __call__(self, name: str, rows: slice) -> torch.Tensor:
        name, block_format = parameter_name(name), self._weights.ref.block_format
        if name.endswith(SCALES_SUFFIX):
            return torch.cat(self._scales[name.removesuffix(SCALES_SUFFIX)])[rows]
        if not name.endswith(EXPERT_WEIGHTS):
            return self._weights.read_rows(name, rows)
        assert block_format is not None
        trained = self._weights.read_trained(name, rows).transpose(1, 2)
        blocks, scales = encode(trained, block_format, importance=self._weights.importance(name))
        self._scales.setdefault(name, []).append(scales)
        return blocks


def _load_effective_packed(ref: ModelRef, dtype: torch.dtype, **arguments: Any) -> "PreTrainedModel":
    """Load a model that gives the same results as `ref`. Its experts are packed.

    If the experts are rounded to MXFP4, the rounded values are packed again, and the model has neither adapters nor
    quantizers. Otherwise it keeps them, because only values of MXFP4 can be packed.
    """
    block_format = ref.block_format
    if block_format is None or block_format.name != MXFP4.name:
        return load_quantized(ref, dtype, **arguments)
    model, weights = load_packed(ref.base, dtype, **arguments), Weights(ref)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in filter(weights.is_changed, weights.names()):
            if not name.endswith(EXPERT_WEIGHTS):
                parameters[name].copy_(weights.read_effective(name))
                continue
            for rows in weights.parts(name):
                trained = weights.read_trained(name, rows).transpose(1, 2)
                packed = encode(trained, block_format, importance=weights.importance(name))
                for parameter, values in zip((name, name + SCALES_SUFFIX), packed, strict=True):
                    parameters[parameter][rows] = values
    return model
