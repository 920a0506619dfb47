"""Validation loss and perplexity."""

from pipeline import losses
from pipeline.evals.subject import Subject
from pipeline.tracking import progress


def score(subject: Subject) -> dict[str, float]:
    """Mean negative log-likelihood in nats: over supervised tokens, and over all tokens; perplexity of the former."""
    if subject.ref is None:
        return {}
    loss = losses.measure(subject.model, progress(subject.batches, what=f"loss of {subject.ref.name}", unit="batch"))
    return {
        "validation_loss": loss.supervised,
        "perplexity": loss.perplexity,
        "validation_loss_all_tokens": loss.over_all,
        "supervised_tokens": loss.supervised_tokens,
    }
