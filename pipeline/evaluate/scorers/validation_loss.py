"""Validation loss and perplexity, in total and for each group of examples."""

import torch

from pipeline.evaluate.subject import Subject
from pipeline.models import losses
from pipeline.runs.console import progress


def score(subject: Subject) -> dict[str, float]:
    """Compute the mean negative log-likelihood in nats over supervised tokens and over all tokens.

    Returns:
        `validation_loss`: the loss over supervised tokens.
        `perplexity`: the perplexity over supervised tokens.
        `supervised_tokens`: the number of supervised tokens.
        `validation_loss_all_tokens`: the loss over all tokens.
        Each figure, except the last, is also given for each group as <figure>/<group>.
        The result is empty for a model on a server.
    """
    if subject.ref is None or subject.model is None:
        return {}
    batches = progress(subject.batches, what=f"loss of {subject.ref.name}", unit="batch")
    of_example = losses.sums_by_example(subject.model, batches)
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
