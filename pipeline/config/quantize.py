"""`quantize`: insert fake quantization."""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from pipeline.config.bounds import POSITIVE


class QuantizeSource(Enum):
    """Models that fake quantizers can be inserted into."""

    sft = "sft"
    upcast = "upcast"


@dataclass
class QuantizeConfig:
    """Insert fake quantization: the PTQ baseline, and the model that QAT starts from."""

    source: QuantizeSource = QuantizeSource.sft
    """Model to quantize: the fine-tuned one (sft) or the original (upcast). With upcast, QAT starts without SFT."""
    calibration_samples: Annotated[int, POSITIVE] = 64
    """Training examples for calibration (where the format needs it) and for the check of the quantizers."""
    batch_size: Annotated[int, POSITIVE] = 1
    """Examples per forward pass."""
