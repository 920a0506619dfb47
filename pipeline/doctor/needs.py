"""What the stages of a run need: bytes on each device and on disk, from the model's sizes and the settings.

Weights, gradients, optimizer states and files follow from the shapes and are exact. Activations are an estimate, from
what a decoder layer keeps for its backward pass in transformers' eager implementation; fragmentation and the CUDA
context come on top. What processes share (`sharding`) is taken off where the needs are held against a machine.

Legend: B batch size, T tokens of the longest example, L layers, H hidden size, I intermediate size, N query heads,
K experts per token, V vocabulary, E experts; w bytes per weight, a bytes per activation.
"""

from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from pipeline.checkpoints.gpt_oss import Shape, TensorInfo, expert_projections, other_tensors, plain_tensors
from pipeline.config import (
    DataConfig,
    LoraTarget,
    Method,
    Precision,
    QatConfig,
    Sharding,
    Stage,
    TrainConfig,
    adapted_layers,
)
from pipeline.config.targets import TARGETS
from pipeline.models import rounded_weights

_WEIGHT_TYPE = {Precision.fp32: "F32", Precision.mixed_bf16: "F32", Precision.bf16: "BF16"}
_WIDTH = {"F32": 4, "BF16": 2}
_STATE_BYTES = {
    "adamw_bnb_8bit": 1.0,
    "adamw_8bit": 1.0,
    "adamw_torch_8bit": 1.0,
    "adamw_torch_4bit": 0.5,
    "sgd": 0.0,
}
"""Bytes of each of Adam's two states of a weight; of optimizers not listed they are of the weight's own type."""
_ADAPTER_WIDTH = 4  # PEFT keeps adapters in FP32
_SCORE_COPIES = 4  # scores, with the sink, less their maximum, and their softmax


@dataclass(frozen=True)
class Plan:
    """The settings that a run's needs depend on.

    Attributes:
        model_path: of the source.
        target: export target, a row of TARGETS.
    """

    model_path: str
    data: DataConfig
    sft: TrainConfig
    qat: QatConfig
    sharding: Sharding
    target: str

    @property
    def trainings(self) -> dict[str, TrainConfig]:
        """Name of each training stage -> its settings."""
        return {Stage.sft.name: self.sft, Stage.qat.name: self.qat}


@dataclass(frozen=True)
class Memory:
    """Bytes that one device has to hold while it trains; `rounded`: experts' weights, kept for a whole step of QAT."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    rounded: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.rounded


def parameters(shape: Shape) -> dict[str, int]:
    """Numbers of parameters: all, and the experts' weights."""
    return {
        "all": _count(plain_tensors(shape)),
        "experts": sum(projection.values for projection in expert_projections(shape)),
    }


def trained_parameters(shape: Shape, train: TrainConfig) -> int:
    """Number of parameters that get gradients.

    An adapter of rank r on a weight (in, out) has r·(in + out) parameters, one on an expert stack E times as many.
    """
    if train.method is Method.full:
        return _count(plain_tensors(shape))
    layers = adapted_layers(train.lora, shape.num_hidden_layers)
    attention = [
        sum(info.shape)
        for name, info in other_tensors(shape).items()
        if name.startswith("model.layers.0.self_attn.") and name.endswith("_proj.weight")
    ]
    experts = [p.experts * (p.in_features + p.out_features) for p in expert_projections(shape) if p.layer == 0]
    per_target = {LoraTarget.attention: sum(attention), LoraTarget.experts: sum(experts)}
    return len(layers) * train.lora.rank * sum(per_target[target] for target in set(train.lora.targets))


def memory(
    shape: Shape, train: TrainConfig, tokens: int, experts_per_token: int, is_quantized: bool, rounded_budget: float = 0
) -> Memory:
    """Bytes on each device.

    Args:
        shape: of the model.
        train: `sft` or `qat` of the configuration.
        tokens: of the longest example.
        experts_per_token: that the router chooses.
        is_quantized: whether fake quantizers run (QAT).
        rounded_budget: how many bytes of rounded weights they may keep.
    """
    every, trained = _count(plain_tensors(shape)), trained_parameters(shape, train)
    width = _WIDTH[_WEIGHT_TYPE[train.precision]]
    is_full = train.method is Method.full
    trained_width = width if is_full else _ADAPTER_WIDTH
    return Memory(
        weights=every * width + (0 if is_full else trained * _ADAPTER_WIDTH),
        gradients=trained * trained_width,
        optimizer=_states(train, trained, trained_width),
        activations=_activations(shape, train, tokens, experts_per_token, is_quantized),
        rounded=int(min(rounded_budget, _changing_experts(shape, train) * _compute_width(train)))
        if is_quantized
        else 0,
    )


def _states(train: TrainConfig, trained: int, width: int) -> int:
    return int(2 * trained * _STATE_BYTES.get(train.optimizer, width))


def _compute_width(train: TrainConfig) -> int:
    return 4 if train.precision is Precision.fp32 else 2


def _changing_experts(shape: Shape, train: TrainConfig) -> int:
    """How many weights of experts are other ones after each step; those that stay are rounded once, in place."""
    layers = list(range(shape.num_hidden_layers))
    if train.method is Method.lora:
        layers = adapted_layers(train.lora, len(layers)) if LoraTarget.experts in train.lora.targets else []
    return sum(projection.values for projection in expert_projections(shape) if projection.layer in layers)


def disk(plan: Plan, shape: Shape, is_packed: bool) -> dict[str, int]:
    """Bytes that each stage leaves in its directory; hard links take none.

    Args:
        plan: which stages train what, and the export's target.
        shape: of the model.
        is_packed: whether the source is MXFP4; a BF16 one is linked.
    """
    plain = {dtype: _bytes(plain_tensors(shape, dtype)) for dtype in _WIDTH}
    saved = {stage: _saved(shape, train) for stage, train in ((Stage.sft, plan.sft), (Stage.qat, plan.qat))}
    merges = plan.sft.method is Method.lora and plan.qat.method is Method.full
    begins = plan.sft.method is Method.full and plan.qat.method is Method.lora
    return {
        "upcast": plain["BF16"] if is_packed else 0,
        "sft": saved[Stage.sft],
        "quantize": plain[_WEIGHT_TYPE[plan.sft.precision]] if merges else saved[Stage.qat] if begins else 0,
        "qat": saved[Stage.qat],
        "export": export_bytes(shape, plan.target),
    }


def export_bytes(shape: Shape, target: str) -> int:
    """Bytes of the tensors of an export.

    Scales of whole tensors and of inputs (NVFP4) are not counted. They take a few bytes per expert.
    """
    layout = TARGETS[target]
    experts = parameters(shape)["experts"] * layout.expert_bits / 8
    others = sum(prod(info.shape) * (4 if layout.is_fp32(name) else 2) for name, info in other_tensors(shape).items())
    return round(experts) + others


def checkpoints(shape: Shape, train: TrainConfig) -> int:
    """Bytes of the checkpoints to resume from, while a stage trains: weights and optimizer states, several times."""
    trained = trained_parameters(shape, train)
    width = _WIDTH[_WEIGHT_TYPE[train.precision]] if train.method is Method.full else _ADAPTER_WIDTH
    # transformers removes the oldest only when the next one is written
    return (train.save_total_limit + 1) * (_saved(shape, train) + _states(train, trained, width))


def figures(plan: Plan, model: dict[str, Any], longest: int) -> dict[str, Any]:
    """What this run needs.

    Args:
        plan: of the run.
        model: config.json of the source.
        longest: tokens of the longest example, already cut.
    """
    shape = Shape.of(model, plan.model_path)
    trains = plan.trainings
    per_token = int(model["num_experts_per_tok"])
    budget, needed = rounded_weights.budget_bytes(plan.qat.rounded_cache_gib, plan.sharding), {}
    for name, train in trains.items():
        batched, tokens = _as_batched(train, longest, plan.data.max_length)
        needed[name] = memory(shape, batched, tokens, per_token, name == "qat", budget)
    return {
        "parameters": parameters(shape),
        "trained_parameters": {name: trained_parameters(shape, train) for name, train in trains.items()},
        "device_bytes": {name: {**asdict(part), "total": part.total} for name, part in needed.items()},
        "disk_bytes": disk(plan, shape, "quantization_config" in model),
        "checkpoint_bytes": {name: checkpoints(shape, train) for name, train in trains.items()},
        "tokens": longest,
    }


def _as_batched(train: TrainConfig, longest: int, max_length: int) -> tuple[TrainConfig, int]:
    """Settings and tokens of a row: padded to the longest example, or all packed rows laid end to end, as TRL does."""
    if not train.packing:
        return train, longest
    return replace(train, batch_size=1), train.batch_size * max_length


def _activations(shape: Shape, train: TrainConfig, tokens: int, experts_per_token: int, is_quantized: bool) -> int:
    """What is kept for the backward pass, at its largest.

    With gradient checkpointing the input of every layer, B·T·H·a, and all of one layer; without it all of every layer.
    Of a layer: a few vectors of width H, the queries, keys and values, K experts of widths 2I and I, eager attention's
    scores B·N·T·T, and the copy of the expert stacks that LoRA (base and delta) or fake quantization (rounded)
    multiplies with; while one is made, two more. Then the logits with their FP32 copy and gradient, and, in mixed
    precision, the BF16 copies of the weights that autocast keeps.
    """
    places = train.batch_size * tokens
    width = _compute_width(train)
    heads, hidden, inner = shape.num_attention_heads, shape.hidden_size, shape.intermediate_size
    attention = 2 * shape.head_dim * (heads + shape.num_key_value_heads)
    values = 8 * hidden + attention + experts_per_token * (6 * inner + 2 * hidden)
    scores = _SCORE_COPIES * heads * tokens if train.attn_implementation == "eager" else 0
    stack = sum(projection.values for projection in expert_projections(shape) if projection.layer == 0)
    is_adapted = train.method is Method.lora and LoraTarget.experts in train.lora.targets
    copy = stack * width * (is_adapted or is_quantized)
    layer = width * places * (values + scores) + copy
    kept = shape.num_hidden_layers * places * hidden * width
    body = kept + layer if train.gradient_checkpointing else shape.num_hidden_layers * layer
    logits = places * shape.vocab_size * (width + 4 + 4)
    autocast = _count(plain_tensors(shape)) * 2 if train.precision is Precision.mixed_bf16 else 0
    return body + 2 * copy + logits + autocast


def _saved(shape: Shape, train: TrainConfig) -> int:
    """Bytes of what a training stage saves."""
    if train.method is Method.lora:
        return trained_parameters(shape, train) * _ADAPTER_WIDTH
    return _bytes(plain_tensors(shape, _WEIGHT_TYPE[train.precision]))


def _count(tensors: dict[str, TensorInfo]) -> int:
    return sum(prod(info.shape) for info in tensors.values())


def _bytes(tensors: dict[str, TensorInfo]) -> int:
    return sum(info.bytes for info in tensors.values())
