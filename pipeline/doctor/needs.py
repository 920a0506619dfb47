"""Compute the bytes that a run needs on each device and on disk, from the model's sizes and the settings.

Weights, gradients, optimizer states and files follow from the shapes and are exact. `activations` estimates the rest of
a device's memory. Fragmentation and the CUDA context are not included. `Memory.on_each` divides the sharded parts by
the number of processes. All other figures assume that each device holds these parts completely.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from math import prod
from typing import NotRequired, TypedDict

from pipeline.checkpoints.config_json import is_quantized
from pipeline.checkpoints.dtypes import TRAIN_TYPES, bytes_per_value
from pipeline.checkpoints.gpt_oss import (
    ATTENTION_PROJECTIONS,
    GptOssJson,
    Shape,
    TensorInfo,
    attention_projection,
    expert_projections,
    loaded_bytes,
    other_tensors,
    packed_tensors,
    plain_tensors,
)
from pipeline.config import (
    LoraTarget,
    Method,
    Oscillation,
    Precision,
    QatConfig,
    QuantizeSource,
    RoundingMethod,
    Stage,
    TrainConfig,
    adapted_layers,
    calibration_tokens,
)
from pipeline.config.targets import TARGETS
from pipeline.doctor import activations, low_bit_adam
from pipeline.doctor.plan import Plan, as_batched
from pipeline.models import rounded_weights
from pipeline.models.sharding import STRATEGIES
from pipeline.numerics.formats import MXFP4
from pipeline.training.flips import BYTES_PER_WEIGHT

_FP32_BYTES, _BF16_BYTES = bytes_per_value("F32"), bytes_per_value("BF16")
_STATE_BYTES = {
    "adamw_bnb_8bit": 1.0,
    "adamw_8bit": 1.0,
    "sgd": 0.0,
}
"""Optimizer -> bytes per weight in each of Adam's two states.

The optimizers in `low_bit_adam` have other states. An optimizer that is in neither table keeps its states in the type
of the weights.
"""
_ADAPTER_BYTES = _FP32_BYTES  # PEFT keeps adapters in FP32
_PACKED_BYTES = MXFP4.bits_per_value / 8


class ParameterCounts(TypedDict):
    """Numbers of parameters: in the whole model, and in the experts' weights."""

    all: int
    experts: int


class DeviceFigures(TypedDict):
    """The peak memory of one GPU while a stage trains.

    `phases` maps each phase of training in `fake_run.PHASES` to its peak, and `estimated_because` is empty. If the
    memory is estimated, `estimated_because` has the reason, and `phases` is empty.
    """

    bytes: int
    phases: dict[str, int]
    estimated_because: str


class ControlFigures(TypedDict):
    """The needs of a control, in bytes: its stages on disk, its files to resume from, and its training on each device.

    `checkpoint_bytes` is the larger of the checkpoints of its training and the layers that GPTQ keeps. It is 0 without
    both. `device_bytes` is 0 if the control does not train.
    """

    disk_bytes: int
    checkpoint_bytes: int
    device_bytes: int


class NeedFigures(TypedDict):
    """The needs of a run, stored in artifact.json.

    `devices` has the peak of each training stage. `device_bytes` maps each training stage to estimated bytes without
    sharding: one entry for each field of Memory, and `total`. `tokens` is the number of tokens of the longest example.
    `controls` has the needs of each control, by its name. It is absent if the run makes no controls.
    """

    parameters: ParameterCounts
    trained_parameters: dict[str, int]
    devices: dict[str, DeviceFigures]
    device_bytes: dict[str, dict[str, int]]
    disk_bytes: dict[str, int]
    checkpoint_bytes: dict[str, int]
    tokens: int
    controls: NotRequired[dict[str, ControlFigures]]


@dataclass(frozen=True)
class Memory:
    """Bytes that one device holds while it trains.

    Attributes:
        weights, gradients, optimizer: the parts that sharding divides between the processes. With
            qat.oscillation=hold, `optimizer` includes the state of held weights (`training.flips`).
        activations: values that are kept for the backward pass, and the working memory of the busiest layer.
        rounded: rounded experts that QAT caches in a step.
        gathered: layers that are gathered while they are used, if parameters are sharded.
        teacher: the model that distillation learns from. If sharding divides the weights, it also divides the teacher.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    rounded: int = 0
    gathered: int = 0
    teacher: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(vars(self).values())

    def on_each(self, processes: int, sharded: Collection[str]) -> int:
        """Return the bytes on each device if the `sharded` parts are divided between the processes."""
        divided = {*sharded, *(["teacher"] if "weights" in sharded else [])}
        return sum(size // processes if part in divided else size for part, size in vars(self).items())


def parameters(shape: Shape) -> ParameterCounts:
    """Count the parameters of a model."""
    return {
        "all": _count(plain_tensors(shape)),
        "experts": sum(projection.values for projection in expert_projections(shape)),
    }


def trained_parameters(shape: Shape, train: TrainConfig) -> int:
    """Count the parameters that get gradients."""
    return sum(trained_tensors(shape, train))


def trained_tensors(shape: Shape, train: TrainConfig) -> list[int]:
    """Return the number of values of each tensor that gets gradients.

    An adapter of rank r on a weight (in, out) has two tensors, with r·in and r·out values. On a stack of E experts,
    they have E times as many values.
    """
    if train.method is Method.full:
        return [prod(info.shape) for info in plain_tensors(shape).values()]
    others = other_tensors(shape)
    if train.method is Method.bf16_parts:
        return [prod(info.shape) for info in others.values()]
    weights = [others[f"{attention_projection(0, name)}.weight"] for name in ATTENTION_PROJECTIONS]
    attention = [size for weight in weights for size in weight.shape]
    projections = [projection for projection in expert_projections(shape) if projection.layer == 0]
    experts = [p.experts * size for p in projections for size in (p.in_features, p.out_features)]
    per_target = {LoraTarget.attention: attention, LoraTarget.experts: experts}
    in_layer = [train.lora.rank * size for target in set(train.lora.targets) for size in per_target[target]]
    return in_layer * len(adapted_layers(train.lora, shape.num_hidden_layers))


def memory(
    shape: Shape,
    train: TrainConfig,
    *,
    tokens: int,
    experts_per_token: int,
    is_quantized: bool,
    rounded_budget: float = 0,
    gathers: bool = False,
    is_packed: bool = False,
    has_own_base: bool = False,
    on_gpu: bool = True,
) -> Memory:
    """Compute the bytes that one device holds while it trains.

    Args:
        shape, train, tokens, experts_per_token, is_quantized, is_packed, on_gpu: as for `activations.estimate`.
        rounded_budget: size limit of the fake quantizers' cache of rounded weights, in bytes.
        gathers: whether parameters are sharded. They are gathered while they are used.
        has_own_base: whether the teacher cannot use the base of the model in training.
    """
    model = loaded_bytes(shape, bytes_per_value(TRAIN_TYPES[train.precision]), stays_packed=is_packed)
    return Memory(
        weights=model + (trained_parameters(shape, train) * _ADAPTER_BYTES if train.method is Method.lora else 0),
        gradients=gradient_bytes(shape, train),
        optimizer=state_bytes(shape, train) + _holder_bytes(shape, train),
        activations=activations.estimate(
            shape,
            train,
            tokens=tokens,
            experts_per_token=experts_per_token,
            is_quantized=is_quantized,
            is_cast=train.precision is Precision.mixed_bf16 and not gathers,
            is_packed=is_packed,
            on_gpu=on_gpu,
        ),
        rounded=_cached_bytes(shape, train, rounded_budget, is_packed=is_packed) if is_quantized else 0,
        gathered=activations.gathered_bytes(shape, train, model) if gathers else 0,
        teacher=_teacher_bytes(shape, train) if has_own_base or not is_packed else 0,
    )


def _cached_bytes(shape: Shape, train: TrainConfig, budget: float, *, is_packed: bool) -> int:
    width = _PACKED_BYTES if is_packed else activations.compute_width(train)
    return int(min(budget, _changing_experts(shape, train) * width))


def _teacher_bytes(shape: Shape, train: TrainConfig) -> int:
    has_teacher = isinstance(train, QatConfig) and train.distillation.weight > 0
    return _count(plain_tensors(shape)) * bytes_per_value(TRAIN_TYPES[train.precision]) if has_teacher else 0


def gradient_bytes(shape: Shape, train: TrainConfig) -> int:
    """Compute the bytes of the gradients of all trained parameters."""
    return trained_parameters(shape, train) * _trained_width(train)


def _trained_width(train: TrainConfig) -> int:
    return _ADAPTER_BYTES if train.method is Method.lora else bytes_per_value(TRAIN_TYPES[train.precision])


def state_bytes(shape: Shape, train: TrainConfig) -> int:
    """Compute the bytes of the optimizer's states of all trained parameters."""
    width = _trained_width(train)
    if train.optimizer in low_bit_adam.BITS:
        sizes = trained_tensors(shape, train)
        return 2 * sum(low_bit_adam.state_bytes(train.optimizer, values, width) for values in sizes)
    return int(2 * trained_parameters(shape, train) * _STATE_BYTES.get(train.optimizer, width))


def _holder_bytes(shape: Shape, train: TrainConfig) -> int:
    is_held = isinstance(train, QatConfig) and train.oscillation is Oscillation.hold
    return BYTES_PER_WEIGHT * _changing_experts(shape, train) if is_held else 0


def _changing_experts(shape: Shape, train: TrainConfig) -> int:
    """Count the expert weights that change in each step. The other experts are rounded once, in place."""
    layers = list(range(shape.num_hidden_layers))
    if train.method is Method.bf16_parts:
        return 0
    if train.method is Method.lora:
        layers = adapted_layers(train.lora, len(layers)) if LoraTarget.experts in train.lora.targets else []
    return sum(projection.values for projection in expert_projections(shape) if projection.layer in layers)


def disk(plan: Plan, shape: Shape, is_mxfp4: bool) -> dict[str, int]:
    """Compute the bytes that each stage leaves in its directory. Hard links take no space.

    Args:
        plan: settings of the run.
        shape: sizes of the model.
        is_mxfp4: whether the source is MXFP4. If training starts from the same form as the source, `upcast` only links
            files.
    """
    starts_packed = plan.starts_packed(is_mxfp4=is_mxfp4)
    upcast = packed_tensors(shape) if starts_packed else plain_tensors(shape)
    has_sft = plan.quantize.source == QuantizeSource.sft
    sft = saved_bytes(shape, plan.sft) if has_sft else 0
    qat = saved_bytes(shape, plan.qat) if Stage.qat.name in plan.trainings else 0
    is_adapted = plan.quantize.source != QuantizeSource.upcast and plan.sft.method is Method.lora
    merges_adapters = is_adapted and plan.qat.method is not Method.lora
    adds_adapters = not is_adapted and plan.qat.method is Method.lora
    merged = _bytes(plain_tensors(shape, TRAIN_TYPES[plan.sft.precision])) if has_sft else _bytes(plain_tensors(shape))
    quantize = merged if merges_adapters else qat if adds_adapters else 0
    if plan.rounds_base:
        is_packed = plan.qat.method is not Method.full and plan.block_format.stores_like(MXFP4)
        adapters = qat if plan.qat.method is Method.lora else 0
        quantize = (_bytes(packed_tensors(shape)) if is_packed else merged) + adapters
    return {
        "upcast": 0 if starts_packed == is_mxfp4 else _bytes(upcast),
        "sft": sft,
        "quantize": quantize,
        "qat": qat,
        "export": export_bytes(shape, plan.target),
    }


def export_bytes(shape: Shape, target: str) -> int:
    """Compute the bytes of an export's tensors.

    NVFP4's tensor scales and input scales are not counted. They take a few bytes per expert.
    """
    layout = TARGETS[target]
    experts = parameters(shape)["experts"] * layout.expert_bits / 8
    others = sum(
        prod(info.shape) * (_FP32_BYTES if layout.is_fp32(name) else _BF16_BYTES)
        for name, info in other_tensors(shape).items()
    )
    return round(experts) + others


def checkpoints(shape: Shape, train: TrainConfig) -> int:
    """Compute the bytes of the checkpoints that a training stage keeps at most."""
    # One more than the limit: transformers removes the oldest checkpoint after it has written the next one.
    count = train.save_total_limit + 1
    written = -(-train.max_steps // train.save_steps) if train.max_steps > 0 else count
    return min(count, written) * checkpoint(shape, train)


def checkpoint(shape: Shape, train: TrainConfig) -> int:
    """Compute the bytes of a checkpoint: weights and optimizer states. With bf16_parts, it lacks the frozen experts."""
    is_partial = train.method is Method.bf16_parts
    weights = gradient_bytes(shape, train) if is_partial else saved_bytes(shape, train)
    return weights + state_bytes(shape, train) + _holder_bytes(shape, train)


def rounded_layers(plan: Plan, shape: Shape, longest: int, experts_per_token: int) -> int:
    """Compute the bytes of the rounded layers and of the hidden states that GPTQ keeps until the stage is complete.

    `longest` is the number of tokens of the longest example. The states of two layers lie on the disk for a moment.
    """
    inputs, samples = max(shape.hidden_size, shape.intermediate_size), plan.quantize.calibration_samples
    tokens = calibration_tokens(plan.quantize, inputs, shape.num_local_experts, experts_per_token)
    tokens = tokens if samples is None else samples * longest
    first = plan.qat if plan.quantize.source == QuantizeSource.upcast else plan.sft
    states = tokens * shape.hidden_size * bytes_per_value(TRAIN_TYPES[first.precision])
    return int(parameters(shape)["experts"] * plan.block_format.bits_per_value / 8) + 2 * states


def kept_layers(plan: Plan, model: GptOssJson, longest: int) -> int:
    """Compute the bytes of `rounded_layers` of a run. 0 if its rounding keeps no layers. Arguments as for `figures`."""
    if plan.quantize.method not in (RoundingMethod.gptq, RoundingMethod.auto):
        return 0
    return rounded_layers(plan, Shape.of(model, plan.model_path), longest, model["num_experts_per_tok"])


def figures(plan: Plan, model: GptOssJson, longest: int, devices: dict[str, DeviceFigures]) -> NeedFigures:
    """Compute the needs of a run.

    Args:
        plan: settings of the run.
        model: content of the source's config.json.
        longest: number of tokens of the longest example, after truncation.
        devices: memory of each training stage, from `device_memory.figures`.
    """
    shape = Shape.of(model, plan.model_path)
    trains = plan.trainings
    layers = kept_layers(plan, model, longest)
    rounded = {Stage.quantize.name: layers} if layers else {}
    needed = {name: of_stage(plan, name, model, longest) for name in trains}
    return {
        "parameters": parameters(shape),
        "trained_parameters": {name: trained_parameters(shape, train) for name, train in trains.items()},
        "devices": devices,
        "device_bytes": {name: {**asdict(part), "total": part.total} for name, part in needed.items()},
        "disk_bytes": disk(plan, shape, is_quantized(model)),
        "checkpoint_bytes": {name: checkpoints(shape, train) for name, train in trains.items()} | rounded,
        "tokens": longest,
    }


def of_stage(plan: Plan, stage: str, model: GptOssJson, longest: int) -> Memory:
    """Estimate the bytes on one device while a stage trains. Arguments are those of `figures`."""
    train, tokens = as_batched(plan.trainings[stage], longest, plan.data.max_length)
    return memory(
        Shape.of(model, plan.model_path),
        train,
        tokens=tokens,
        experts_per_token=model["num_experts_per_tok"],
        is_quantized=stage == Stage.qat.name,
        rounded_budget=rounded_weights.budget_bytes(plan.qat.rounded_cache_gib, plan.sharding, on_gpu=plan.on_gpu),
        gathers=STRATEGIES[plan.sharding].gathers,
        is_packed=plan.is_packed(stage, model),
        has_own_base=plan.rounds_base,
        on_gpu=plan.on_gpu,
    )


def saved_bytes(shape: Shape, train: TrainConfig) -> int:
    """Compute the bytes of the weights or adapters that a training stage saves."""
    if train.method is Method.lora:
        return trained_parameters(shape, train) * _ADAPTER_BYTES
    if train.method is Method.bf16_parts:
        return _bytes(packed_tensors(shape))
    return _bytes(plain_tensors(shape, TRAIN_TYPES[train.precision]))


def _count(tensors: dict[str, TensorInfo]) -> int:
    return sum(prod(info.shape) for info in tensors.values())


def _bytes(tensors: dict[str, TensorInfo]) -> int:
    return sum(info.bytes for info in tensors.values())
