"""What is measured of a model: one file per kind of scoring, one row in EVALS."""

from collections.abc import Callable

from pipeline.evals import size, validation_loss, weights
from pipeline.evals.subject import Subject

EVALS: dict[str, Callable[[Subject], dict[str, float]]] = {
    "validation_loss": validation_loss.score,
    "size": size.score,
    "weights": weights.score,
}
"""Name -> score(subject), which returns figure -> value."""
