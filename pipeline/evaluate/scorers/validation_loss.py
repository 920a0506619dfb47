"""Validation loss and perplexity, over all and for each group of examples."""

import torch

from pipeline.evaluate.subject import Subject
from pipeline.models import losses
from pipeline.runs.console import progress


def score(subject: Subject) -> dict[str, float]:
    """Mean negative log-likelihood in nats: over supervised tokens, and over all tokens; perplexity of the former.

    `validation_loss`, `perplexity` and `supervised_tokens` also of each group, as <figure>/<group>.
    """
    if subject.ref is None:
        return {}
    made = progress(subject.batches, what=f"loss of {subject.ref.name}", unit="batch")
    of_example = losses.sums_by_example(subject.model, made)
    loss = losses.from_sums(of_example.sum(0))
    found = {**_figures(loss, ""), "validation_loss_all_tokens": loss.over_all}
    for group in sorted({*subject.groups} - {""}):
        mask = torch.tensor([each == group for each in subject.groups])
        found |= _figures(losses.from_sums(of_example[mask].sum(0)), f"/{group}")
    return found


def _figures(loss: losses.Loss, suffix: str) -> dict[str, float]:
    return {
        f"validation_loss{suffix}": loss.supervised,
        f"perplexity{suffix}": loss.perplexity,
        f"supervised_tokens{suffix}": loss.supervised_tokens,
    }
