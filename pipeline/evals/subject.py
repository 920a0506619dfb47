"""What a scorer is given."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.models import ModelRef, Weights


@dataclass(frozen=True)
class Subject:
    """A model to be scored.

    Attributes:
        ref: where it is on disk.
        model: loaded, with the weights that its forward pass uses.
        weights: the same weights, one at a time, by name.
        reference: weights that its own are held against: the fine-tuned model's, or the upcast's where there is none.
        batches: validation examples.
    """

    ref: ModelRef
    model: Any
    weights: Weights
    reference: Weights
    batches: list[dict[str, Tensor]]
