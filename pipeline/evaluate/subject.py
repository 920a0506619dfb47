"""What a scorer is given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.evaluate.transcripts import Transcript
from pipeline.models.references import ModelRef
from pipeline.models.weights import Weights


@dataclass(frozen=True)
class Subject:
    """A model to be scored. Of one on a server there is only what it wrote, and what was said of that.

    Attributes:
        ref: where it is on disk.
        model: loaded, with the weights that its forward pass uses.
        weights: the same weights, one at a time, by name.
        reference: weights that its own are held against: the fine-tuned model's, or the upcast's where there is none.
        batches: validation examples.
        transcripts: what the model answered to the prompts, where any were generated.
        groups: what each validation example belongs to, in the order of the batches; "" for none.
        reference_predictions: where `logits.record` kept those of the reference on these batches, if it did.
        judgements: what a judge said of the transcripts, by prompt and sample; None without one.
        suites: what lm-evaluation-harness found, by task and metric.
    """

    ref: ModelRef | None
    model: Any
    weights: Weights | None
    reference: Weights | None
    batches: Sequence[dict[str, Tensor]]
    transcripts: Sequence[Transcript] = ()
    groups: Sequence[str] = ()
    reference_predictions: Path | None = None
    judgements: Mapping[tuple[str, int], Any] | None = None
    suites: Mapping[str, float] = field(default_factory=dict)
