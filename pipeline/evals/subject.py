"""What a scorer is given."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.models import ModelRef, Weights
from pipeline.transcripts import Transcript


@dataclass(frozen=True)
class Subject:
    """A model to be scored. Of one on a server there are transcripts alone: the others are None, and no batches.

    Attributes:
        ref: where it is on disk.
        model: loaded, with the weights that its forward pass uses.
        weights: the same weights, one at a time, by name.
        reference: weights that its own are held against: the fine-tuned model's, or the upcast's where there is none.
        batches: validation examples.
        transcripts: what the model answered to the prompts, where any were generated.
        reference_predictions: where `logits.record` kept those of the reference on these batches, if it did.
    """

    ref: ModelRef | None
    model: Any
    weights: Weights | None
    reference: Weights | None
    batches: Sequence[dict[str, Tensor]]
    transcripts: Sequence[Transcript] = ()
    reference_predictions: Path | None = None
