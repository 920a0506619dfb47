"""Find prompts that are in both the training and the validation rows. Their validation loss measures memorization."""

from collections.abc import Callable
from typing import TypedDict

from pipeline.data.conversations import Conversation
from pipeline.data.prompts import normalize, words
from pipeline.doctor.rows import Row

_SHOWN = 3


class LeakFigures(TypedDict):
    """Validation rows whose prompt is also in the training rows.

    `exact` counts prompts that are equal word for word. `normalized` counts prompts that are equal after normalization.
    `share` and `first` refer to normalized prompts. Each entry of `first` has the form "validation row = training row".
    """

    exact: int
    normalized: int
    share: float
    first: list[str]


def figures(train: list[Row], validation: list[Row]) -> LeakFigures:
    """Find validation rows whose prompt is also in the training rows.

    The prompt of a row consists of all messages before the first answer.
    """
    exact, alike = (_shared(train, validation, key) for key in (words, normalize))
    pairs = [f"{held_out.conversation.where} = {trained.conversation.where}" for held_out, trained in alike]
    return {
        "exact": len(exact),
        "normalized": len(alike),
        "share": len(alike) / len(validation),
        "first": pairs[:_SHOWN],
    }


def _shared(train: list[Row], validation: list[Row], key: Callable[[Conversation], str]) -> list[tuple[Row, Row]]:
    """Return pairs of a validation row and the first training row with the same prompt."""
    trained = {key(row.conversation): row for row in reversed(train)}
    return [(row, trained[same]) for row in validation if (same := key(row.conversation)) in trained]
