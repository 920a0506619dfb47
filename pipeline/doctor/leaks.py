"""Find prompts that are in both the training and the validation rows. Their validation loss measures memorization."""

import re
import unicodedata
from collections.abc import Callable
from typing import TypedDict

from pipeline.data.harmony import Conversation
from pipeline.doctor.content import prompt
from pipeline.doctor.rows import Row

_QUOTES = re.compile("[\"'`´“”„‘’‚«»「」]")
_PUNCTUATION = re.compile(r"[.,;:!?…。，、；：！？]+(?=\s|$)")  # keeps the punctuation within numbers
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
    exact, normalized = (_shared(train, validation, key) for key in (_words, _normalized))
    pairs = [f"{held_out.conversation.where} = {trained.conversation.where}" for held_out, trained in normalized]
    return {
        "exact": len(exact),
        "normalized": len(normalized),
        "share": len(normalized) / len(validation),
        "first": pairs[:_SHOWN],
    }


def _shared(train: list[Row], validation: list[Row], key: Callable[[Conversation], str]) -> list[tuple[Row, Row]]:
    """Return pairs of a validation row and the first training row with the same prompt."""
    trained = {key(row.conversation): row for row in reversed(train)}
    return [(row, trained[same]) for row in validation if (same := key(row.conversation)) in trained]


def _words(conversation: Conversation) -> str:
    return "\0".join(f"{message['role']}\0{message['content']}" for message in prompt(conversation))


def _normalized(conversation: Conversation) -> str:
    """Normalize a prompt: apply NFKC, fold case, remove quotes and closing punctuation, and collapse white space."""
    text = unicodedata.normalize("NFKC", _words(conversation)).casefold()
    return " ".join(_PUNCTUATION.sub(" ", _QUOTES.sub("", text).replace("\0", "\n")).split())
