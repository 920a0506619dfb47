"""Scorers of models.

Each scorer has a file and a row in EVALS. Scorers must not know stages or the whole configuration.
"""

from collections.abc import Callable, Sequence

from pipeline.evaluate.scorers import (
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
from pipeline.evaluate.subject import Subject
from pipeline.evaluate.transcripts import Transcript
from pipeline.evaluate.verdicts import Verdict

EVALS: dict[str, Callable[[Subject], dict[str, float]]] = {
    "validation_loss": validation_loss.score,
    "size": size.score,
    "weights": weights.score,
    "logits": logits.score,
    "reasoning_language": language.score_reasoning,
    "answer_language": language.score_answer,
    "refusal": refusal.score,
    "judge": judge.score,
    "exact_match": exact_match.score,
    "format_health": format_health.score,
    "suites": harness.score,
}
"""Name of a scorer -> function that returns figures by name, or an empty dict if the subject lacks the needed input."""

VERDICTS: dict[str, Callable[[Sequence[Transcript]], list[Verdict]]] = {
    "reasoning_language": language.reasoning_verdicts,
    "answer_language": language.answer_verdicts,
    "safe_answered": refusal.safe_verdicts,
    "unsafe_refused": refusal.unsafe_verdicts,
    "exact_match": exact_match.verdicts,
    "format_health": format_health.verdicts,
}
"""Name of a pass rate -> function that returns its verdicts, one for each transcript that the rate applies to."""

FORM_ONLY = frozenset({"format_health"})
"""The pass rates that depend on the form of the answers alone. A model can pass them without one right answer."""
