"""Defines conversations: messages, tools and settings in the form of the chat template."""

from dataclasses import dataclass, field, replace
from typing import TypedDict, cast

from pipeline.runs.json_files import Json

ROLES = ("system", "developer", "user", "assistant", "tool")
INSTRUCTIONS = ("system", "developer")
"""Roles of messages with instructions."""
LANGUAGE_LINE = "reasoning language:"  # as in OpenAI's cookbook and in HuggingFaceH4/Multilingual-Thinking


class Function(TypedDict):
    """The name and the arguments of a function that the model calls."""

    name: str
    arguments: Json


class ToolCall(TypedDict):
    """A tool call in the chat template's form. `type` is always "function"."""

    type: str
    function: Function


class _NameAndDescription(TypedDict):
    name: str
    description: str


class FunctionSchema(_NameAndDescription, total=False):
    """A function that the model may call. `parameters` is a JSON schema, without which the function has none."""

    parameters: dict[str, object]


class Tool(TypedDict):
    """A function in the chat template's form. `type` is always "function"."""

    type: str
    function: FunctionSchema


class _RoleAndContent(TypedDict):
    role: str
    content: str


class Message(_RoleAndContent, total=False):
    """A message in the chat template's form.

    Keys that a message may have:
        thinking: reasoning of an assistant message.
        tool_calls: exactly one call. `content` is then text for the user that precedes the call.
        preamble: text for the user that precedes the final answer, in the channel `commentary`.
        name: the function whose result a tool message holds, if it is not the function that was called last.
        weight: 0 for an assistant message that is context only, and is not trained.
    """

    thinking: str
    tool_calls: list[ToolCall]
    preamble: str
    name: str
    weight: int


class ConversationError(ValueError):
    """A conversation is invalid. The error text names the faulty message and the reason."""


@dataclass(frozen=True)
class Conversation:
    """A valid conversation in the chat template's form.

    Attributes:
        messages: the messages in order.
        tools: function schemas offered to the model, or None.
        reasoning_effort: the effort of this conversation, or None to use the data set's effort.
        reasoning_language: the language of this conversation, or None to use the data set's language. If the
            instructions name a language, that language takes precedence over both.
        merged_instructions: whether a system and a developer message were joined into one.
        where: the conversation's place for error messages, such as its file and row.
        expected: values that scorers need, such as the right answer: name -> value in the row.
    """

    messages: list[Message]
    tools: list[Tool] | None = None
    reasoning_effort: str | None = None
    reasoning_language: str | None = None
    merged_instructions: bool = False
    where: str = field(default="", compare=False)
    expected: dict[str, str] = field(default_factory=dict, compare=False)


def is_trained(message: Message) -> bool:
    """Return whether a message is an assistant message whose weight is not 0."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def is_final(message: Message) -> bool:
    """Return whether a message is an answer to the user, and not a tool call."""
    return message["role"] == "assistant" and "tool_calls" not in message


def drop_answer(conversation: Conversation, effort: str, language: str | None) -> Conversation:
    """Drop the last message if it is an assistant message, and fill in the reasoning effort and language.

    Args:
        conversation: an evaluation prompt.
        effort: reasoning effort for a conversation that names no effort.
        language: reasoning language for a conversation that names no language, or None.
    """
    messages = conversation.messages[:-1] if conversation.messages[-1]["role"] == "assistant" else conversation.messages
    messages = add_language(messages, conversation.reasoning_language or language)
    return replace(
        conversation,
        messages=messages,
        reasoning_effort=conversation.reasoning_effort or effort,
        reasoning_language=stated_language(messages),
    )


def add_language(messages: list[Message], language: str | None) -> list[Message]:
    """Insert the line "reasoning language: …" before the instructions, unless their first line names a language."""
    if language is None or stated_language(messages) is not None:
        return messages
    line = f"{LANGUAGE_LINE} {language}"
    if messages and messages[0]["role"] in INSTRUCTIONS:
        opening, *rest = messages
        text = f"{line}\n\n{opening['content']}" if opening["content"] else line
        return [cast(Message, {**opening, "content": text}), *rest]
    return [{"role": "system", "content": line}, *messages]


def stated_language(messages: list[Message]) -> str | None:
    """Return the language that the first line of the instructions names, or None."""
    if not messages or messages[0]["role"] not in INSTRUCTIONS:
        return None
    key, colon, language = messages[0]["content"].partition("\n")[0].partition(":")
    return language.strip() if f"{key.strip().lower()}{colon}" == LANGUAGE_LINE else None
