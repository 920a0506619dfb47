"""Prompts that are in training and in validation: their validation loss measures memory."""

import re
import unicodedata
from collections.abc import Callable
from typing import Any

from pipeline.data.harmony import Conversation
from pipeline.doctor.content import prompt
from pipeline.doctor.rows import Row

_QUOTES = re.compile("[\"'`´“”„‘’‚«»「」]")
_PUNCTUATION = re.compile(r"[.,;:!?…。，、；：！？]+(?=\s|$)")  # not that within numbers
_SHOWN = 3


def figures(train: list[Row], validation: list[Row]) -> dict[str, Any]:
    """Validation rows whose prompt is also trained on: word for word, and after normalization as well.

    A prompt is all that stands before the first answer.
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
    """(validation row, the first training row that has its prompt)."""
    trained = {key(row.conversation): row for row in reversed(train)}
    return [(row, trained[same]) for row in validation if (same := key(row.conversation)) in trained]


def _words(conversation: Conversation) -> str:
    return "\0".join(f"{message['role']}\0{message['content']}" for message in prompt(conversation))


def _normalized(conversation: Conversation) -> str:
    """One form of each character, without case, quotes, closing punctuation and differences of space."""
    text = unicodedata.normalize("NFKC", _words(conversation)).casefold()
    return " ".join(_PUNCTUATION.sub(" ", _QUOTES.sub("", text).replace("\0", "\n")).split())
