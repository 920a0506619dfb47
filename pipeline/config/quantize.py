"""Settings of `quantize`: the rounding of the experts, and the insertion of fake quantization."""

import math
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated, Optional

from pipeline.config.bounds import POSITIVE, SEED, Bound
from pipeline.config.format import FormatConfig, FormatName
from pipeline.config.training import Method, Precision, QatConfig, SftConfig, TrainConfig
from pipeline.errors import UserError, did_you_mean

CALIBRATION_SAMPLES = 64
"""Examples that calibrate a format, unless `quantize.calibration_samples` is set."""


class QuantizeSource(StrEnum):
    """Stages whose models `quantize` accepts. Any other value of `quantize.source` is a directory of adapters."""

    sft = "sft"
    upcast = "upcast"


_SOURCE = Bound(
    f"{', '.join(QuantizeSource)}, or a directory of adapters",
    lambda value: bool(value.strip()),
    (*map(str, QuantizeSource),),
)


class RoundingMethod(Enum):
    """Ways to round the experts."""

    nearest = "nearest"
    stochastic = "stochastic"
    gptq = "gptq"
    auto = "auto"


class Fallback(Enum):
    """Ways to round experts that have too few tokens for GPTQ."""

    stochastic = "stochastic"
    nearest = "nearest"


class RoundingScales(Enum):
    """Ways to choose the scales to round to: the base's own scales, or a rule of SCALE_RULES."""

    base = "base"
    ceil = "ceil"
    floor = "floor"
    mse = "mse"


@dataclass
class QuantizeConfig:
    """Insert fake quantization. The resulting model is the PTQ baseline, and QAT starts from it."""

    source: Annotated[str, _SOURCE] = QuantizeSource.sft.value
    """Model to quantize: sft, upcast (QAT starts without SFT), or a directory of PEFT adapters in place of SFT."""
    method: RoundingMethod = RoundingMethod.nearest
    """Rounding of the experts: nearest, stochastic, gptq, or auto (the one nearest to SFT); see docs/formats.md."""
    scales: Optional[RoundingScales] = None
    """Scales to round to: base (own scales of a packed base), ceil, floor or mse; null: see docs/formats.md."""
    seed: Annotated[int, SEED] = 42
    """Random seed of stochastic rounding."""
    damping: Annotated[float, POSITIVE] = 0.01
    """For method=gptq: added to the diagonal of each Hessian, as a fraction of the diagonal's mean."""
    tokens_per_input: Annotated[float, POSITIVE] = 8.0
    """For method=gptq: an expert with fewer calibration tokens per input dimension is rounded by quantize.fallback."""
    fallback: Fallback = Fallback.stochastic
    """For method=gptq: rounding of experts with too few calibration tokens: stochastic or nearest."""
    calibration_samples: Annotated[Optional[int], POSITIVE] = None
    """Training examples to calibrate the format or gptq; null: 64, and for gptq twice the tokens that it needs."""
    auto_samples: Annotated[int, POSITIVE] = 64
    """For method=auto: number of validation examples on which the roundings are compared."""
    batch_size: Annotated[int, POSITIVE] = 1
    """Number of examples per forward pass."""

    @property
    def adapters(self) -> str | None:
        """The directory of the adapters that another program saved and that are this run's SFT, or None."""
        return None if self.source in (*QuantizeSource,) else self.source


def writes_rounded(quantize: QuantizeConfig) -> bool:
    """Return whether `quantize` writes rounded experts. Otherwise only the forward pass rounds them."""
    return quantize.method is not RoundingMethod.nearest or quantize.scales is not None


_UNEVENNESS = 2
"""Routers give some experts fewer tokens than others. So GPTQ gets this many times the tokens of an even routing."""


def calibration_tokens(quantize: QuantizeConfig, inputs: int, experts: int, experts_per_token: int) -> int:
    """Return how many tokens GPTQ takes from the data, unless `quantize.calibration_samples` is set.

    Args:
        quantize: section `quantize`.
        inputs: largest input dimension of the experts' matrices.
        experts: experts of a layer.
        experts_per_token: experts that the router chooses for each token.
    """
    return math.ceil(_UNEVENNESS * quantize.tokens_per_input * inputs * experts / experts_per_token)


def source_problem(source: str) -> str | None:
    """Return a message if `quantize.source` is a mistyped name of a stage, else None.

    A directory of adapters may be gone, because only `quantize` and evaluations need it. So a name that is not like a
    stage's may be a path.
    """
    meant = did_you_mean(source, map(str, QuantizeSource))
    if source in (*QuantizeSource,) or not meant or "/" in source or Path(source).exists():
        return None
    return (
        f"quantize.source={source}: neither a stage ({', '.join(QuantizeSource)}) nor a directory of adapters.{meant}"
    )


def trained_sft(source: str, sft: SftConfig) -> SftConfig:
    """Return the settings with which the run's SFT was made. Adapters of another program are LoRA in BF16."""
    if source in (*QuantizeSource,):
        return sft
    return replace(sft, method=Method.lora, precision=Precision.bf16)


def first_training(source: str, sft: SftConfig, qat: QatConfig) -> tuple[str, TrainConfig]:
    """Return the name and the settings of the first training stage. It is `qat` with quantize.source=upcast.

    Adapters of another program count as an SFT with LoRA, because `quantize` merges them or QAT continues with them.
    """
    return ("qat", qat) if source == QuantizeSource.upcast else ("sft", trained_sft(source, sft))


def leaves_nothing_to_round(source: str, sft: TrainConfig, name: FormatName) -> bool:
    """Return whether the fine-tuned model's experts are the source's own MXFP4 weights, so that nothing is rounded."""
    return source == QuantizeSource.sft and sft.method is Method.bf16_parts and name is FormatName["mxfp4"]


def raise_if_nothing_to_round(source: str, sft: TrainConfig, name: FormatName) -> None:
    """Raise UserError if `leaves_nothing_to_round`. The stages `quantize` and `qat` then have no work."""
    if leaves_nothing_to_round(source, sft, name):
        raise UserError(
            "sft.method=bf16_parts: there is nothing to round. The experts are still the source's own MXFP4 weights, so"
            " the fine-tuned model needs neither quantize nor qat. Export it: run stage=export."
        )


def packs_rounded(qat: QatConfig, block_format: FormatConfig) -> bool:
    """Return whether `quantize` rounds the experts and packs them, because QAT trains only the BF16 parts.

    Only MXFP4 can be packed. With `importance`, rounding needs a calibrated model, so the experts stay plain.
    """
    is_mxfp4 = block_format.name is FormatName["mxfp4"]
    return qat.method is Method.bf16_parts and is_mxfp4 and not block_format.importance


def rounds_base(quantize: QuantizeConfig, qat: QatConfig, block_format: FormatConfig) -> bool:
    """Return whether QAT starts from experts that `quantize` has rounded and written."""
    return writes_rounded(quantize) or packs_rounded(qat, block_format)
