"""The input that every scorer gets: a model with its answers and validation examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.evaluate.judgements import Judgement
from pipeline.evaluate.transcripts import Transcript
from pipeline.models.references import ModelRef
from pipeline.models.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Subject:
    """A model to be scored. For a model on a server, only transcripts, judgements and suites are set.

    Attributes:
        ref: the model on disk, or None for a model on a server.
        model: the loaded model, or None. It gives the same results as `ref`.
        weights: the weights that its forward pass uses, read one at a time by name.
        reference: the weights of the reference model: the fine-tuned model, or the upcast model if none was fine-tuned.
        batches: validation examples.
        transcripts: the model's answers to the prompts; empty if none were generated.
        groups: one group per validation example, in the same order as in `batches`. Without a group, the entry is "".
        reference_predictions: directory with the reference's predictions on `batches` (see `logits.record`).
        judgements: the judge's verdicts by (prompt_id, sample), or None if there is no judge.
        suites: the results of lm-evaluation-harness by name, `lm_eval/<task>/<metric>`.
    """

    ref: ModelRef | None
    model: "PreTrainedModel | None"
    weights: Weights | None
    reference: Weights | None
    batches: Sequence[dict[str, Tensor]]
    transcripts: Sequence[Transcript] = ()
    groups: Sequence[str] = ()
    reference_predictions: Path | None = None
    judgements: Mapping[tuple[str, int], Judgement] | None = None
    suites: Mapping[str, float] = field(default_factory=dict)
