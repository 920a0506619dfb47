"""What is measured of a model: one file per kind of scoring, one row in EVALS."""

from collections.abc import Callable

from pipeline.evals import (
    exact_match,
    format_health,
    harness,
    judge,
    language,
    logits,
    refusal,
    size,
    validation_loss,
    weights,
)
from pipeline.evals.subject import Subject

EVALS: dict[str, Callable[[Subject], dict[str, float]]] = {
    "validation_loss": validation_loss.score,
    "size": size.score,
    "weights": weights.score,
    "logits": logits.score,
    "reasoning_language": language.reasoning,
    "answer_language": language.answer,
    "refusal": refusal.score,
    "judge": judge.score,
    "exact_match": exact_match.score,
    "format_health": format_health.score,
    "suites": harness.score,
}
"""Name -> score(subject), which returns figure -> value; nothing where the subject has not got what it takes."""
