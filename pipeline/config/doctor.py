"""Settings of `doctor`: the check of data and machine before training."""

from dataclasses import dataclass, field
from typing import Annotated, Optional

from pipeline.config.bounds import NOT_NEGATIVE, POSITIVE, Bound
from pipeline.config.gpus import GpuName
from pipeline.config.languages import NAMES

_TWO_LANGUAGES = Bound("at least two different languages", lambda value: len(set(value)) >= 2)


@dataclass
class DoctorConfig:
    """Check the data and the machine before training."""

    row: Annotated[int, POSITIVE] = 1
    """Number of the conversation to show token by token. Numbers start at 1 and run through the whole data set."""
    languages: Annotated[list[str], _TWO_LANGUAGES] = field(default_factory=lambda: list(NAMES.values()))
    """Languages to detect in prompts, reasoning and answers, as ISO 639-1 codes. A short list gives fewer errors."""
    gpu: Optional[GpuName] = None
    """GPU for which doctor predicts time and memory; null: the GPU of this machine, or its CPU."""
    price_per_gpu_hour: Annotated[Optional[float], NOT_NEGATIVE] = None
    """Price of one GPU for one hour, in any currency. doctor then estimates the cost of the run. null: no cost."""
    required: bool = True
    """Stop stage=all, sft and qat if doctor predicts too little memory or disk space; false: only warn."""
