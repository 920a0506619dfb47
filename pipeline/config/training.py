"""Settings of `sft` and `qat`, the two training stages."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Optional

from pipeline.config.bounds import BELOW_1, FROM_0_TO_1, NOT_NEGATIVE, POSITIVE, SEED, Bound, Composed, one_of

ROUNDING_OPTIMIZERS = ("adamw_torch_8bit", "adamw_torch_4bit")
"""Values of `optimizer` that support `stochastic_rounding`."""

AUTO_ATTENTION = "auto"
"""Value of `attn_implementation` that lets the program choose."""

_SCHEDULE = one_of("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
_STEPS = Bound("a number of steps, or -1", lambda value: value == -1 or value > 0)
_AT_LEAST_TWO = Bound(
    "2 or more, because the previous checkpoint is needed until the next is complete", lambda value: value >= 2
)


class Precision(Enum):
    """Data types of weights and arithmetic in training."""

    fp32 = "fp32"
    mixed_bf16 = "mixed_bf16"
    bf16 = "bf16"


class ExpertsImplementation(Enum):
    """Kernels that multiply inputs by the experts' weights. transformers uses the same names."""

    auto = "auto"
    eager = "eager"
    batched_mm = "batched_mm"
    grouped_mm = "grouped_mm"

    @property
    def quantizes_activations(self) -> bool:
        """Return whether the kernel runs all input quantizers. grouped_mm skips the quantizer before down_proj."""
        return self is not ExpertsImplementation.grouped_mm


class Method(Enum):
    """Weights to train: all weights, low-rank adapters on a frozen base, or all weights except the experts' matrices.

    `bf16_parts` trains the tensors that MXFP4 keeps in BF16: attention, routers, norms, embedding, head, sinks and
    all biases.
    """

    full = "full"
    lora = "lora"
    bf16_parts = "bf16_parts"


class Oscillation(Enum):
    """What QAT does about expert weights whose 4-bit values flip back and forth."""

    none = "none"
    hold = "hold"


class LoraTarget(Enum):
    """Parts of a layer that get adapters."""

    attention = "attention"
    experts = "experts"


@dataclass
class LoraConfig:
    """Low-rank adapters. Used only with method=lora."""

    rank: Annotated[int, POSITIVE] = 8
    """Rank r of each adapter. Each expert has its own, so a stack of E experts has E·r·(in + out) adapter weights."""
    alpha: Annotated[int, POSITIVE] = 16
    """Scale of the adapters. The product of an adapter's two factors is multiplied by alpha / rank."""
    targets: list[LoraTarget] = field(default_factory=lambda: [LoraTarget.attention, LoraTarget.experts])
    """Parts of a layer that get adapters: attention (q, k, v, o), experts (gate_up and down), or both."""
    layers: Optional[list[int]] = None
    """Layers that get adapters, counted from 0; null: the layers that every_nth selects, or else all layers."""
    every_nth: Annotated[Optional[int], POSITIVE] = None
    """Alternative to layers: adapt every n-th layer. every_nth=8 adapts layers 7, 15 and 23 of 24 layers."""


def adapted_layers(lora: LoraConfig, count: int) -> list[int]:
    """Return the layers that get adapters in a model of `count` layers. `lora.layers` is returned unchecked."""
    if lora.every_nth is not None:
        return list(range(lora.every_nth - 1, count, lora.every_nth))
    return list(range(count)) if lora.layers is None else lora.layers


def show_lora(lora: LoraConfig) -> str:
    """Return the settings of adapters as a text for messages."""
    targets = [target.name for target in lora.targets]
    return (
        f"{{rank: {lora.rank}, alpha: {lora.alpha}, targets: {targets}, layers: {lora.layers},"
        f" every_nth: {lora.every_nth}}}"
    )


def layers_problem(lora: LoraConfig, count: int, section: str) -> str | None:
    """Return a message if a model of `count` layers lacks a layer that gets adapters, else None."""
    layers = adapted_layers(lora, count)
    if layers and set(layers) <= set(range(count)):
        return None
    setting = f"layers={lora.layers}" if lora.every_nth is None else f"every_nth={lora.every_nth}"
    return f"{section}.lora.{setting}: the model has the layers 0 to {count - 1}."


@dataclass
class TrainConfig:
    """Settings that both training stages have. Each stage adds a few."""

    method: Method = Method.full
    """Train every weight (full), adapters (lora), or all tensors that the format keeps in BF16 (bf16_parts)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    learning_rate: Annotated[float, POSITIVE] = 2.0e-5
    """Peak learning rate."""
    lr_scheduler: Annotated[str, _SCHEDULE] = "cosine"
    """Learning-rate schedule after warm-up, as named in transformers."""
    warmup_ratio: Annotated[float, BELOW_1] = 0.03
    """Share of all steps in which the learning rate rises to its peak."""
    epochs: Annotated[float, POSITIVE] = 1.0
    """Number of passes over the training data. Ignored if max_steps is set."""
    max_steps: Annotated[int, _STEPS] = -1
    """Number of optimizer steps; -1: as many as the epochs take."""
    batch_size: Annotated[int, POSITIVE] = 1
    """Number of examples per device and forward pass. With packing=true, the number of rows."""
    packing: bool = False
    """Pack several whole examples into each row, up to data.max_length tokens. They do not attend to each other."""
    gradient_accumulation_steps: Annotated[int, POSITIVE] = 8
    """Number of forward passes per optimizer step."""
    optimizer: str = "adamw_torch_fused"
    """Optimizer, as named in transformers."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Decoupled weight decay, as in AdamW."""
    max_grad_norm: Annotated[float, POSITIVE] = 1.0
    """Largest gradient norm. Larger gradients are scaled down to this norm."""
    precision: Precision = Precision.mixed_bf16
    """fp32, mixed_bf16 (FP32 weights, BF16 arithmetic) or bf16 (BF16 weights; low learning rates lose updates)."""
    stochastic_rounding: bool = False
    """Round updated BF16 weights stochastically, so small updates take effect. Needs optimizer=adamw_torch_8bit."""
    attn_implementation: str = AUTO_ATTENTION
    """Attention kernel: fused_sinks or a kernel of transformers; auto: the best correct one for device and packing."""
    experts_implementation: ExpertsImplementation = ExpertsImplementation.auto
    """Kernel of the experts; auto: the fastest kernel that runs all quantizers (eager or grouped_mm)."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass. This saves memory, but a step takes about a third longer."""
    reshard_after_forward: bool = True
    """With sharding=fsdp2: free gathered layers after the forward pass, and gather them again for the backward pass."""
    router_aux_loss_coef: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the router's load-balancing loss. The released config has 0.9, which would dominate the token loss."""
    logging_steps: Annotated[int, POSITIVE] = 1
    """Number of optimizer steps between two lines of metrics."""
    eval_steps: Annotated[int, POSITIVE] = 50
    """Number of optimizer steps between two validations. There is always a validation after the last step."""
    save_steps: Annotated[int, POSITIVE] = 50
    """Number of optimizer steps between two checkpoints to resume from."""
    save_total_limit: Annotated[int, _AT_LEAST_TWO] = 2
    """Number of checkpoints to keep during training, including the newest and the best. All are removed at the end."""
    keep_best: bool = True
    """Keep the weights with the lowest validation loss, not the last weights. Needs save_steps = eval_steps."""
    early_stopping_patience: Annotated[Optional[int], POSITIVE] = None
    """Stop after this many validations in a row without a new lowest loss; null: never stop early."""
    seed: Annotated[int, SEED] = 42
    """Random seed of the data order and of the initial adapters."""


@dataclass
class SftConfig(TrainConfig):
    """Fine-tune the upcast checkpoint, or continue an earlier fine-tuning."""

    start: Optional[str] = None
    """Directory of a complete sft stage of the same base. Training continues from its model; null: from the upcast."""


@dataclass
class DistillationConfig:
    """Quantization-aware distillation (QAD): QAT also learns from the predictions of the SFT model."""

    weight: Annotated[float, FROM_0_TO_1] = 0.0
    """Weight of the distillation loss (KL divergence from the SFT model's predictions). 0: none; 1: no other loss."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """Temperature of the predictions of teacher and student. Values above 1 give more weight to unlikely tokens."""


@dataclass
class QatConfig(TrainConfig):
    """Train with fake quantization of the experts."""

    learning_rate: Annotated[float, POSITIVE, Composed("${rate_of_sft:0.33}")] = 6.6e-6
    """Peak learning rate: a number, or a fraction of sft.learning_rate, such as '${rate_of_sft:0.2}'."""
    rounded_cache_gib: Annotated[Optional[float], NOT_NEGATIVE] = None
    """Largest cache of rounded experts, in GiB; 0: no cache; null: 1 on a CPU if sharding is none or zero2, else 0."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    oscillation: Oscillation = Oscillation.none
    """Expert weights that flip between two 4-bit values: none (train on) or hold (keep at their mean; method=full)."""
