"""Every setting: name, type, default and meaning. YAML files under conf/ and recipes/ hold values only.

`resolve` turns what Hydra composed into `PipelineConfig`; `problems` holds the rules between settings.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Optional

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import UserError, did_you_mean, user_errors

SYNTHETIC = "synthetic://"
"""Prefix of a model or data set that the program makes itself, for trying it without the internet."""


class Stage(Enum):
    """The parts of a run, in the order in which `all` runs them."""

    upcast = "upcast"
    sft = "sft"
    quantize = "quantize"
    qat = "qat"
    export = "export"
    verify = "verify"
    evaluate = "evaluate"
    compare = "compare"
    all = "all"


class Dtype(Enum):
    """Floating-point type of a model's weights and arithmetic."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class Precision(Enum):
    """Weights / arithmetic while training."""

    fp32 = "fp32"
    mixed_bf16 = "mixed_bf16"
    bf16 = "bf16"


class Method(Enum):
    """What is trained: every weight, or low-rank adapters on a frozen base."""

    full = "full"
    lora = "lora"


class Sharding(Enum):
    """How the processes of a training stage share one model: the rows of sharding.ENGINES."""

    none = "none"
    fsdp2 = "fsdp2"
    zero2 = "zero2"
    zero3 = "zero3"


class LoraTarget(Enum):
    """Parts of a layer that get adapters."""

    attention = "attention"
    experts = "experts"


class Supervise(Enum):
    """Which assistant turns of a conversation are trained."""

    every_turn = "every_turn"
    last_turn = "last_turn"


class FormatName(Enum):
    """Number formats to train for: the rows of numerics.formats.FORMATS."""

    mxfp4 = "mxfp4"
    nvfp4 = "nvfp4"
    nvfp4_w4a4 = "nvfp4_w4a4"


class ScaleRule(Enum):
    """How a block's scale is chosen: the rules of numerics.formats.SCALE_RULES."""

    ceil = "ceil"
    floor = "floor"
    nearest = "nearest"
    mse = "mse"


class Device(Enum):
    """Where tensors are converted."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ExportTarget(Enum):
    """Layouts that `export` writes: the rows of EXPORTERS."""

    mxfp4 = "mxfp4"


class ReasoningEffort(Enum):
    """The `Reasoning:` line of the Harmony system message."""

    low = "low"
    medium = "medium"
    high = "high"


@dataclass
class TinyConfig:
    """The small random gpt-oss behind `model.path=synthetic://tiny`."""

    num_hidden_layers: int = 2
    """Decoder layers; sliding and full attention alternate."""
    hidden_size: int = 64
    """Width of the residual stream; a multiple of 32, the block size of MXFP4."""
    intermediate_size: int = 96
    """Width of each expert; a multiple of 32; unlike hidden_size by default, so that a wrong transpose cannot load."""
    num_local_experts: int = 8
    """Experts per layer."""
    num_experts_per_tok: int = 4
    """Experts that each token is sent to."""
    num_attention_heads: int = 4
    """Query heads."""
    num_key_value_heads: int = 2
    """Key and value heads."""
    head_dim: int = 32
    """Width of one attention head."""
    sliding_window: int = 64
    """Window of the sliding-attention layers, in tokens."""
    vocab_size: int = 768
    """Rows of the embedding; like the released models, more than the tokenizer has tokens."""
    shard_bytes: int = 300_000
    """Size limit of one weight file; small, so that there are several."""
    seed: int = 0
    """Seed of the weights."""


@dataclass
class ModelConfig:
    """The model to start from."""

    path: str = MISSING
    """Checkpoint to start from: a directory or a hub id, MXFP4 or BF16; `synthetic://tiny` makes model.tiny."""
    revision: Optional[str] = None
    """Revision of a hub id: branch, tag or commit."""
    dtype: Dtype = Dtype.bfloat16
    """Arithmetic of evaluate and verify; training has its own `precision`."""
    tiny: TinyConfig = field(default_factory=TinyConfig)


@dataclass
class DataConfig:
    """The conversations to train and validate on."""

    path: Optional[str] = None
    """Chat data: a .jsonl or .parquet file, a folder of them, a saved data set, a hub id, or `synthetic://arithmetic`."""
    revision: Optional[str] = None
    """Revision of a hub id: branch, tag or commit."""
    split: str = "train"
    """Split of a hub id or of a saved data set dictionary."""
    max_samples: Optional[int] = None
    """Use only this many rows, chosen with data.seed; null: all."""
    validation_fraction: float = 0.1
    """Share of the rows that is held out for validation, never trained on."""
    seed: int = 42
    """Seed of the choice of rows and of the split."""
    max_length: int = 4096
    """Longest training example in tokens; the rest is cut off at the end, and counted."""
    supervise: Supervise = Supervise.every_turn
    """Train every assistant turn, each with the prompt that it has at inference, or only the last turn."""
    reasoning_effort: ReasoningEffort = ReasoningEffort.medium
    """The `Reasoning:` line of the system message; a row's own `reasoning_effort` wins."""
    conversation_date: str = "2025-08-05"
    """The `Current date:` line of the system message, pinned so that a run can be repeated."""


@dataclass
class LoraConfig:
    """Low-rank adapters; read only when method is lora."""

    rank: int = 8
    """Rank of each adapter; on experts, of each expert's own adapter."""
    alpha: int = 16
    """Scale of the update: alpha / rank."""
    targets: list[LoraTarget] = field(default_factory=lambda: [LoraTarget.attention, LoraTarget.experts])
    """Parts that get adapters: attention (q, k, v, o), experts (gate_up and down), or both."""
    layers: Optional[list[int]] = None
    """Layers that get adapters, counted from 0; null: all."""


@dataclass
class TrainConfig:
    """One training stage: `sft`, and with a few more settings `qat`."""

    method: Method = Method.full
    """Train every weight (full) or adapters (lora)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    learning_rate: float = 2.0e-5
    """Peak learning rate."""
    lr_scheduler: str = "cosine"
    """Schedule after warm-up, by its transformers name: cosine, linear, constant_with_warmup, …"""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises."""
    epochs: float = 1.0
    """Passes over the training data, unless max_steps says otherwise."""
    max_steps: int = -1
    """Optimizer steps; -1: as many as `epochs` takes."""
    batch_size: int = 1
    """Examples per device and forward pass."""
    gradient_accumulation_steps: int = 8
    """Forward passes per optimizer step."""
    optimizer: str = "adamw_torch"
    """Optimizer, by its transformers name."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    precision: Precision = Precision.mixed_bf16
    """fp32; mixed_bf16: FP32 weights, BF16 arithmetic; bf16: BF16 weights, which low learning rates hardly move."""
    attn_implementation: str = "eager"
    """Attention kernel, by its transformers name; it must honour gpt-oss' attention sinks, which sdpa does not."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    router_aux_loss_coef: float = 0.0
    """Weight of the router's load-balancing loss. The released config says 0.9, which would drown the loss proper."""
    logging_steps: int = 1
    """Optimizer steps between two lines of metrics."""
    eval_steps: int = 50
    """Optimizer steps between two validation losses; the last step always has one."""
    save_steps: int = 50
    """Optimizer steps between two checkpoints to resume from."""
    save_total_limit: int = 2
    """Checkpoints kept while training; they are removed when the stage is complete."""
    seed: int = 42
    """Seed of the data order and of the adapters."""


@dataclass
class QatConfig(TrainConfig):
    """Training on with fake quantization."""

    rounded_cache_gib: Optional[float] = None
    """Memory for the experts' rounded weights, kept between forward passes; null: all, none where they are gathered."""


@dataclass
class FormatConfig:
    """The 4-bit format of the experts' weights."""

    name: FormatName = FormatName.mxfp4
    """mxfp4; nvfp4; nvfp4_w4a4: NVFP4 with the inputs of the experts quantized too, on a calibrated scale."""
    scale_rule: ScaleRule = ScaleRule.ceil
    """Scale of a block: ceil (holds the largest value), floor (may clip it), mse (better of two), nearest (NVFP4)."""
    importance: bool = False
    """With scale_rule=mse: weigh each input channel's error by the mean square of what calibration sends through it."""


@dataclass
class UpcastConfig:
    """MXFP4 -> BF16."""

    shard_bytes: int = 5_000_000_000
    """Size limit of one weight file, in bytes."""


@dataclass
class QuantizeConfig:
    """Insert fake quantization: the PTQ baseline, and where QAT starts."""

    calibration_samples: int = 64
    """Training examples run through the model for calibration (formats that need it) and for the proof."""
    batch_size: int = 1
    """Examples per forward pass."""


@dataclass
class ExportConfig:
    """Write a checkpoint for serving."""

    source: Optional[str] = None
    """What to export: a stage of this run (upcast, sft, quantize, qat) or a directory; null: the newest of the run."""
    target: ExportTarget = ExportTarget.mxfp4
    """Layout to write: mxfp4 (Hugging Face layout of openai/gpt-oss)."""
    shard_bytes: int = 5_000_000_000
    """Size limit of one weight file, in bytes."""


@dataclass
class VerifyConfig:
    """Prove that an export is right."""

    checkpoint: Optional[str] = None
    """Directory to check; null: this run's export."""
    reference: Optional[str] = None
    """Base checkpoint whose layout it must have; null: model.path."""
    samples: int = 8
    """Validation examples whose logits are compared."""
    logits_tolerance: float = 1.0e-4
    """Largest allowed difference of a logit; the weights are compared bit for bit, here sums may differ in order."""


@dataclass
class EvaluateConfig:
    """Measure models."""

    source: Optional[str] = None
    """What to measure: a stage of this run, a checkpoint directory, or `all` stages; null: the newest of the run."""
    max_samples: Optional[int] = None
    """Use only this many validation examples; null: all."""
    batch_size: int = 4
    """Examples per forward pass."""


@dataclass
class PipelineConfig:
    """The whole pipeline; `stage` only says which part to run now."""

    stage: Stage = MISSING
    """The part of the pipeline to run."""
    recipe: str = "default"
    """Name of the recipe (chosen on the command line as recipe=<name>)."""
    run_dir: str = "runs/${recipe}"
    """Where the run's artifacts go."""
    device: Device = Device.auto
    """Where upcast and export compute: auto is the GPU if there is one. The bits are the same everywhere."""
    overwrite: bool = False
    """Rebuild a stage that is complete, and discard unfinished work done with other settings."""
    sharding: Sharding = Sharding.none
    """What processes share while training: nothing but data; fsdp2 or zero3: all; zero2: gradients and optimizer."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    upcast: UpcastConfig = field(default_factory=UpcastConfig)
    sft: TrainConfig = field(default_factory=TrainConfig)
    format: FormatConfig = field(default_factory=FormatConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    qat: QatConfig = field(default_factory=QatConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def setting_keys(node: Any = PipelineConfig, prefix: str = "") -> list[str]:
    """Full dotted keys of all settings, sections included."""
    keys: list[str] = []
    for item in fields(node):
        keys.append(prefix + item.name)
        if is_dataclass(item.type):
            keys += setting_keys(item.type, f"{prefix}{item.name}.")
    return keys


def is_known(key: str) -> bool:
    """Whether the schema has a setting or section of this full key."""
    return key in _known_keys()


def unknown_key(key: str, where: str) -> str:
    """The message for a key that the schema does not have."""
    return f"{where}: unknown key {key!r}.{did_you_mean(key, setting_keys())} `--help` lists all keys."


def value_problem(key: str, value: Any) -> str | None:
    """Why `value` does not fit the setting `key`, or None."""
    try:
        OmegaConf.update(OmegaConf.structured(PipelineConfig), key, value, merge=True)
    except (OmegaConfBaseException, ValueError) as error:
        return f"{key}={value!r}: {str(error).splitlines()[0]}"
    return None


def resolve(composed: DictConfig) -> PipelineConfig:
    """The composed configuration as plain dataclasses.

    Raises:
        UserError: an unknown key, a value of the wrong type, a missing value, a broken rule; all rules together.
    """
    # `+sft.lr=1` adds a key to what Hydra composed, and OmegaConf.to_object drops it: a fresh schema refuses it.
    unknown = [key for key in _leaf_keys(composed) if not is_known(key)]
    if unknown:
        raise user_errors([unknown_key(key, "configuration") for key in unknown])
    try:
        merged = OmegaConf.merge(OmegaConf.structured(PipelineConfig), composed)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise user_errors([_not_set(key) for key in missing])
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {str(error).splitlines()[0]}") from error
    assert isinstance(config, PipelineConfig)
    found = problems(config)
    if found:
        raise user_errors(found)
    return config


def problems(config: PipelineConfig) -> list[str]:
    """Every rule that the settings break, each with its full key and value."""
    found = [
        f"{key}={value!r}: must be {rule.meaning}."
        for key, rule in _RULES.items()
        if (value := _select(config, key)) is not None and not rule.holds(value)
    ]
    for section in ("sft", "qat"):
        train: TrainConfig = getattr(config, section)
        if train.attn_implementation not in _KEEP_SINKS:
            found.append(
                f"{section}.attn_implementation={train.attn_implementation!r}: must be one of"
                f" {', '.join(_KEEP_SINKS)}; others lose gpt-oss' attention sinks or their gradient."
            )
        if train.method is Method.lora and train.precision is Precision.mixed_bf16:
            found.append(
                f"{section}.precision=mixed_bf16: not with LoRA, whose merge autocast would round otherwise than export"
                " does. Use bf16 (the adapters stay FP32) or fp32."
            )
        if train.lr_scheduler not in _SCHEDULERS:
            found.append(f"{section}.lr_scheduler={train.lr_scheduler!r}: must be one of {', '.join(_SCHEDULERS)}.")
        if train.method is Method.lora and not train.lora.targets:
            found.append(f"{section}.lora.targets=[]: LoRA needs at least one of attention, experts.")
    rules = _SCALE_RULES[config.format.name]
    if config.format.scale_rule not in rules:
        found.append(
            f"format.scale_rule={config.format.scale_rule.name}: {config.format.name.name} has"
            f" {', '.join(rule.name for rule in rules)}."
        )
    if config.format.importance and config.format.scale_rule is not ScaleRule.mse:
        found.append(
            f"format.importance=true: has a meaning only with format.scale_rule=mse, not"
            f" {config.format.scale_rule.name}."
        )
    held = _HELD_BY[config.export.target]
    if config.stage in (Stage.export, Stage.all) and config.format.name not in held:
        found.append(
            f"export.target={config.export.target.name}: holds {', '.join(name.name for name in held)}, not"
            f" format={config.format.name.name}. Train for another format, or run the stages up to qat and evaluate one"
            " by one."
        )
    both_lora = config.sft.method is Method.lora and config.qat.method is Method.lora
    if both_lora and config.sft.lora != config.qat.lora:
        found.append(
            f"qat.lora={_shown(config.qat.lora)} differs from sft.lora={_shown(config.sft.lora)}: QAT goes on with"
            " SFT's adapters. Give both the same values."
        )
    return found


def _not_set(key: str) -> str:
    choices = f" Choose one of: {', '.join(Stage.__members__)}." if key == "stage" else ""
    return f"{key}: is not set. Give {key}=<value>.{choices}"


def _shown(lora: LoraConfig) -> str:
    targets = [target.name for target in lora.targets]
    return f"{{rank: {lora.rank}, alpha: {lora.alpha}, targets: {targets}, layers: {lora.layers}}}"


@dataclass(frozen=True)
class _Rule:
    meaning: str
    holds: Callable[[Any], bool]


_POSITIVE = _Rule("greater than 0", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE = _Rule("0 or more", lambda value: 0 <= value < math.inf)
_FRACTION = _Rule("between 0 and 1, both excluded", lambda value: 0 < value < 1)
_SHARE = _Rule("0 or more and below 1", lambda value: 0 <= value < 1)
_SEED = _Rule("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)
_AT_LEAST_TWO = _Rule("2 or more: the one before is needed while one is written", lambda value: value >= 2)
_STEPS = _Rule("a number of steps, or -1", lambda value: value == -1 or value > 0)
_BLOCKS = _Rule("a positive multiple of 32, the block size of MXFP4", lambda value: value > 0 and value % 32 == 0)

_TRAIN_RULES = {
    "learning_rate": _POSITIVE,
    "warmup_ratio": _SHARE,
    "epochs": _POSITIVE,
    "max_steps": _STEPS,
    "batch_size": _POSITIVE,
    "gradient_accumulation_steps": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _POSITIVE,
    "router_aux_loss_coef": _NOT_NEGATIVE,
    "seed": _SEED,
    "logging_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "save_total_limit": _AT_LEAST_TWO,
    "lora.rank": _POSITIVE,
    "lora.alpha": _POSITIVE,
}
_RULES = {
    "model.tiny.hidden_size": _BLOCKS,
    "model.tiny.intermediate_size": _BLOCKS,
    "model.tiny.seed": _SEED,
    "data.seed": _SEED,
    "data.max_samples": _POSITIVE,
    "data.validation_fraction": _FRACTION,
    "data.max_length": _POSITIVE,
    "upcast.shard_bytes": _POSITIVE,
    "quantize.calibration_samples": _POSITIVE,
    "quantize.batch_size": _POSITIVE,
    "export.shard_bytes": _POSITIVE,
    "verify.samples": _POSITIVE,
    "verify.logits_tolerance": _NOT_NEGATIVE,
    "evaluate.max_samples": _POSITIVE,
    "evaluate.batch_size": _POSITIVE,
    "qat.rounded_cache_gib": _NOT_NEGATIVE,
    **{f"{section}.{key}": rule for section in ("sft", "qat") for key, rule in _TRAIN_RULES.items()},
}
_SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
_SCALE_RULES = {
    FormatName.mxfp4: (ScaleRule.ceil, ScaleRule.floor, ScaleRule.mse),
    FormatName.nvfp4: (ScaleRule.nearest, ScaleRule.ceil, ScaleRule.floor, ScaleRule.mse),
    FormatName.nvfp4_w4a4: (ScaleRule.nearest, ScaleRule.ceil, ScaleRule.floor, ScaleRule.mse),
}
_HELD_BY = {ExportTarget.mxfp4: (FormatName.mxfp4,)}

_KEEP_SINKS = ("eager", "flex_attention")


def _select(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _leaf_keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in map(str, node):
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and len(child):
            keys += _leaf_keys(child, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


@cache
def _known_keys() -> frozenset[str]:
    return frozenset(setting_keys())
