"""`sft` and `qat`: the two training stages."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Optional

from pipeline.config.bounds import BELOW_1, FROM_0_TO_1, NOT_NEGATIVE, POSITIVE, SEED, Bound, one_of

ROUNDING_OPTIMIZERS = ("adamw_torch_8bit", "adamw_torch_4bit")
"""Values of `optimizer` that support `stochastic_rounding`."""

_SCHEDULE = one_of("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
_STEPS = Bound("a number of steps, or -1", lambda value: value == -1 or value > 0)
_AT_LEAST_TWO = Bound(
    "2 or more, because the previous checkpoint is needed until the next is complete", lambda value: value >= 2
)


class Precision(Enum):
    """Types of weights and arithmetic in training."""

    fp32 = "fp32"
    mixed_bf16 = "mixed_bf16"
    bf16 = "bf16"


class ExpertsImplementation(Enum):
    """Kernels that multiply with the experts' weights, by their transformers names."""

    auto = "auto"
    eager = "eager"
    batched_mm = "batched_mm"
    grouped_mm = "grouped_mm"

    @property
    def quantizes_activations(self) -> bool:
        """Whether the kernel runs the quantizers of all inputs; grouped_mm skips those of down_proj's inputs."""
        return self is not ExpertsImplementation.grouped_mm


class Method(Enum):
    """Weights that are trained: all of them, or low-rank adapters on a frozen base."""

    full = "full"
    lora = "lora"


class LoraTarget(Enum):
    """Parts of a layer that get adapters."""

    attention = "attention"
    experts = "experts"


@dataclass
class LoraConfig:
    """Low-rank adapters. Used only with method=lora."""

    rank: Annotated[int, POSITIVE] = 8
    """Rank r of each adapter. Each of E experts has its own, so a projection takes E·r·(in + out) weights."""
    alpha: Annotated[int, POSITIVE] = 16
    """Scale of the update: alpha / rank."""
    targets: list[LoraTarget] = field(default_factory=lambda: [LoraTarget.attention, LoraTarget.experts])
    """Parts that get adapters: attention (q, k, v, o), experts (gate_up and down), or both."""
    layers: Optional[list[int]] = None
    """Layers that get adapters, counted from 0; null: the layers of every_nth, or all layers."""
    every_nth: Annotated[Optional[int], POSITIVE] = None
    """Alternative to layers: adapt every n-th layer, such as 7, 15 and 23 for n = 8 in a model of 24 layers."""


def adapted_layers(lora: LoraConfig, count: int) -> list[int]:
    """The layers that get adapters in a model of `count` layers. Nothing checks that the model has `lora.layers`."""
    if lora.every_nth is not None:
        return list(range(lora.every_nth - 1, count, lora.every_nth))
    return list(range(count)) if lora.layers is None else lora.layers


@dataclass
class TrainConfig:
    """One training stage: `sft`. `qat` has a few settings more."""

    method: Method = Method.full
    """Train every weight (full) or adapters (lora)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    learning_rate: Annotated[float, POSITIVE] = 2.0e-5
    """Peak learning rate."""
    lr_scheduler: Annotated[str, _SCHEDULE] = "cosine"
    """Schedule after warm-up, by its transformers name."""
    warmup_ratio: Annotated[float, BELOW_1] = 0.03
    """Share of the steps, at the start, in which the learning rate rises."""
    epochs: Annotated[float, POSITIVE] = 1.0
    """Passes over the training data. max_steps takes precedence."""
    max_steps: Annotated[int, _STEPS] = -1
    """Optimizer steps; -1: as many as the epochs take."""
    batch_size: Annotated[int, POSITIVE] = 1
    """Examples per device and forward pass."""
    packing: bool = False
    """Pack whole examples, isolated from each other, into rows of up to data.max_length; batch_size counts rows."""
    gradient_accumulation_steps: Annotated[int, POSITIVE] = 8
    """Forward passes per optimizer step."""
    optimizer: str = "adamw_torch_fused"
    """Optimizer, by its transformers name."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, POSITIVE] = 1.0
    """Largest norm of the gradients. Larger gradients are clipped."""
    precision: Precision = Precision.mixed_bf16
    """fp32; mixed_bf16 (FP32 weights, BF16 arithmetic); bf16 (BF16 weights, which low learning rates hardly change)."""
    stochastic_rounding: bool = False
    """Round updates of BF16 weights at random, so that small updates take effect; needs optimizer=adamw_torch_8bit."""
    attn_implementation: str = "eager"
    """Attention kernel, by its transformers name. It is compared with eager first, as many kernels ignore sinks."""
    experts_implementation: ExpertsImplementation = ExpertsImplementation.auto
    """Kernel of the experts; auto: grouped_mm, or eager for formats that also quantize inputs."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass. Saves memory and takes about a third more time."""
    router_aux_loss_coef: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the router's load-balancing loss. The 0.9 of the released config would dominate the actual loss."""
    logging_steps: Annotated[int, POSITIVE] = 1
    """Optimizer steps between two lines of metrics."""
    eval_steps: Annotated[int, POSITIVE] = 50
    """Optimizer steps between two validation losses. The last step always has one."""
    save_steps: Annotated[int, POSITIVE] = 50
    """Optimizer steps between two checkpoints to resume from."""
    save_total_limit: Annotated[int, _AT_LEAST_TWO] = 2
    """Checkpoints to keep in training, including the newest and the best. A complete stage has removed them."""
    keep_best: bool = True
    """Keep the weights with the lowest validation loss instead of the last weights; needs save_steps = eval_steps."""
    early_stopping_patience: Annotated[Optional[int], POSITIVE] = None
    """Stop after this many validation losses in a row without a new lowest one; null: never."""
    seed: Annotated[int, SEED] = 42
    """Seed of the data order and of the adapters."""


@dataclass
class DistillationConfig:
    """Distillation from the SFT model, in addition to the data (QAD)."""

    weight: Annotated[float, FROM_0_TO_1] = 0.0
    """Weight of the KL divergence from the SFT model in the loss, from 0 to 1; 0: no distillation."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """Temperature of both distributions. Above 1, unlikely tokens count for more."""


@dataclass
class QatConfig(TrainConfig):
    """Training with fake quantization."""

    rounded_cache_gib: Annotated[Optional[float], NOT_NEGATIVE] = None
    """Cache for the experts' rounded weights, in GiB; null: no limit, or no cache if sharding gathers parameters."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
