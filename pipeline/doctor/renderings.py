"""Counts the rows whose tokens differ between openai-harmony's rendering and the chat template.

Engines use one or the other, so a model that is trained with one sees other tokens in an engine that uses the other.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TypedDict

from pipeline.config import RenderingForm
from pipeline.data import harmony
from pipeline.data.conversations import INSTRUCTIONS, Conversation, ConversationError
from pipeline.data.harmony import Rendering
from pipeline.data.template_text import TemplateError
from pipeline.doctor.rows import Row, first
from pipeline.runs.console import progress, warn

_MOST_MESSAGES = 500  # the template takes time in proportion to the square of the number of messages


class RenderingFigures(TypedDict):
    """Which rendering is used, and how many of the compared rows have other text with the other rendering.

    `parts` counts, by the kind of message, the rows that differ and have such a message. `refused` counts the rows that
    the chat template cannot write.
    """

    form: str
    compared: int
    differ: int
    refused: int
    parts: dict[str, int]
    first: list[str]


def figures(rows: list[Row], how: Rendering) -> RenderingFigures:
    """Compare the last trained turn of each row, with its prompt, in both renderings."""
    last = replace(how, every_turn=False)
    compared = [row for row in rows if len(row.conversation.messages) <= _MOST_MESSAGES]
    refused, differing = 0, []
    for number, row in enumerate(progress(compared, what="renderings", unit="row")):
        try:
            texts = {_text(row.conversation, replace(last, form=form.name)) for form in RenderingForm}
        except ConversationError:
            refused += 1
            continue
        except TemplateError as error:
            use = (
                ""
                if how.form == RenderingForm.harmony.name
                else " Use data.rendering=harmony, or shorter conversations."
            )
            warn("doctor", f"only {number} rows are compared in both renderings. {error.reason}{use}")
            compared = compared[:number]
            break
        if len(texts) > 1:
            differing.append(row)
    parts = Counter(part for row in differing for part in _parts(row.conversation))
    return {
        "form": how.form,
        "compared": len(compared),
        "differ": len(differing),
        "refused": refused,
        "parts": dict(parts.most_common()),
        "first": first(differing),
    }


def _text(conversation: Conversation, how: Rendering) -> str:
    script = harmony.render(conversation, how)
    return "".join(script.prompt(turn) + turn.completion for turn in script.turns)


def _parts(conversation: Conversation) -> Iterator[str]:
    """Yield the kinds of a conversation's parts that the two renderings may write differently."""
    messages = conversation.messages
    if messages[0]["role"] in INSTRUCTIONS and not conversation.tools:
        yield "instructions"
    if conversation.tools:
        yield "tools"
    if any("tool_calls" in message for message in messages):
        yield "calls"
    if any(message["role"] == "tool" for message in messages):
        yield "results"
