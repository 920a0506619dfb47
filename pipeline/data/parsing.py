"""Checks the rows of chat data sets, and makes conversations from them."""

from collections.abc import Mapping, Sequence

from pipeline.data.conversations import (
    INSTRUCTIONS,
    LANGUAGE_LINE,
    Conversation,
    ConversationError,
    Message,
    is_trained,
    stated_language,
)
from pipeline.data.functions import check_text, parse_tools
from pipeline.data.messages import parse_messages


def parse_conversation(
    row: object, where: str = "", needs_answer: bool = True, places: Sequence[str] | None = None
) -> Conversation:
    """Check one row of a chat data set.

    Args:
        row: {"messages": [{"role", "content", "thinking"?, "tool_calls"?}, …], "tools"?, "reasoning_effort"?,
            "reasoning_language"?}. A key whose value is None counts as absent: Arrow adds such keys. `parse_messages`
            converts other forms of messages.
        where: the row's place, for error messages.
        needs_answer: whether the row must have an assistant message to train. Evaluation prompts need no answer.
        places: see `parse_messages`.

    Raises:
        ConversationError: the row is not a valid conversation.
    """
    if not isinstance(row, dict):
        raise ConversationError(f"is a {type(row).__name__}, not an object with 'messages'")
    messages = row.get("messages")
    if messages is None:
        raise ConversationError(f"has no 'messages' (it has: {', '.join(sorted(map(str, row))) or 'nothing'})")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ConversationError("'messages' is not a list with at least one message")
    cleaned = parse_messages(messages, places)
    merged = _merge_instructions(cleaned)
    _check_order(merged, needs_answer)
    joined = len(merged) < len(cleaned)
    return Conversation(merged, parse_tools(row.get("tools")), _effort(row), _language(row, merged), joined, where)


def _merge_instructions(messages: list[Message]) -> list[Message]:
    """Join the leading system and developer messages into one, because the template keeps only the first of them."""
    leading = 0
    while leading < len(messages) and messages[leading]["role"] in INSTRUCTIONS:
        leading += 1
    if leading < 2:
        return messages
    text = "\n\n".join(message["content"] for message in messages[:leading])
    return [{"role": "developer", "content": text}, *messages[leading:]]


def _check_order(messages: list[Message], needs_answer: bool) -> None:
    if needs_answer and not any(message["role"] == "assistant" for message in messages):
        raise ConversationError("has no assistant message: there is nothing to learn")
    if needs_answer and not any(map(is_trained, messages)):
        raise ConversationError("has the weight 0 in every assistant message: there is nothing to learn")
    if messages[-1]["role"] in INSTRUCTIONS:
        raise ConversationError("has only instructions and no user message")
    if messages[0]["role"] == "assistant":
        raise ConversationError("begins with an assistant message, so there is no question before it")


def _effort(row: Mapping[str, object]) -> str | None:
    effort = row.get("reasoning_effort")
    if effort is not None and (not isinstance(effort, str) or effort not in ("low", "medium", "high")):
        raise ConversationError(f"'reasoning_effort' is {effort!r}, not low, medium or high")
    return effort


def _language(row: Mapping[str, object], messages: list[Message]) -> str | None:
    language = row.get("reasoning_language")
    if language is None:
        return None
    if not isinstance(language, str) or not language.strip() or "\n" in language:
        raise ConversationError(f"'reasoning_language' is {language!r}, not the name of a language")
    check_text("'reasoning_language'", language)
    stated = stated_language(messages)
    if stated is not None and stated.lower() != language.strip().lower():
        raise ConversationError(
            f"'reasoning_language' is {language!r}, but its instructions begin with '{LANGUAGE_LINE} {stated}'"
        )
    return language.strip()
