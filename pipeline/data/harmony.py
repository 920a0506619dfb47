"""Checks conversations, and renders them in the Harmony format as prompts and completions.

An assistant turn has exactly the same form in training as at inference. The prompt has all earlier messages, and ends
with `<|start|>assistant`. The completion has the reasoning, the answer and the stop token. Only it is supervised. In a
prompt, the template drops the reasoning of earlier turns. So each assistant turn becomes an example of its own.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypedDict, cast

from pipeline.checkpoints.gpt_oss import SPECIAL_TOKENS, STOP_TOKENS
from pipeline.data.tokenizers import Tokenizer
from pipeline.runs.json_files import Json

IGNORED = -100
"""Label of a token that is not supervised. It is the default `ignore_index` of torch's cross entropy."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_INSTRUCTIONS = ("system", "developer")
_LANGUAGE_LINE = "reasoning language:"  # as in OpenAI's cookbook and in HuggingFaceH4/Multilingual-Thinking


class Function(TypedDict):
    """The name and the arguments of a function that the model calls."""

    name: str
    arguments: Json


class ToolCall(TypedDict):
    """A tool call in the chat template's form. `type` is always "function"."""

    type: str
    function: Function


class _RoleAndContent(TypedDict):
    role: str
    content: str


class Message(_RoleAndContent, total=False):
    """A message in the chat template's form. If the message calls a tool, `tool_calls` has exactly one item."""

    thinking: str
    tool_calls: list[ToolCall]


_PLACEHOLDER: list[Message] = [{"role": "user", "content": ""}]


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
    tools: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    reasoning_language: str | None = None
    merged_instructions: bool = False
    where: str = field(default="", compare=False)
    expected: dict[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Rendering:
    """Settings for rendering conversations.

    Attributes:
        tokenizer: a tokenizer with gpt-oss' chat template.
        reasoning_effort: low, medium or high. It applies to conversations that name no effort.
        conversation_date: the date after `Current date:` in the system message.
        every_turn: whether every assistant turn becomes an example. Otherwise only the last turn does.
        reasoning_language: the language for conversations that name no language, or None.
        model_identity: first line of the system message, or None to keep the template's first line.
    """

    tokenizer: Tokenizer
    reasoning_effort: str
    conversation_date: str
    every_turn: bool
    reasoning_language: str | None = None
    model_identity: str | None = None


class Turn(NamedTuple):
    """An assistant turn as text: the prompt, exactly as at inference, and the completion that the model learns."""

    prompt: str
    completion: str


def parse_conversation(row: object, where: str = "", needs_answer: bool = True) -> Conversation:
    """Check one row of a chat data set.

    Args:
        row: {"messages": [{"role", "content", "thinking"?, "tool_calls"?}, …], "tools"?, "reasoning_effort"?,
            "reasoning_language"?}. A key whose value is None counts as absent: Arrow adds such keys.
        where: the row's place, for error messages.
        needs_answer: whether the row must have an assistant message. Evaluation prompts need no answer.

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
    cleaned = [_message(i, message) for i, message in enumerate(messages)]
    merged = _merge_instructions(cleaned)
    _check_order(merged, needs_answer)
    joined = len(merged) < len(cleaned)
    return Conversation(merged, _tools(row.get("tools")), _effort(row), _language(row, merged), joined, where)


def examples(conversation: Conversation, rendering: Rendering) -> list[dict[str, list[int]]]:
    """Make one training example per supervised assistant turn. `input_ids` and `labels` have the same length.

    Raises:
        ConversationError: the chat template refuses the conversation or is not a Harmony template.
    """
    return tokenize(render_turns(conversation, rendering), rendering)


def render_turns(conversation: Conversation, rendering: Rendering) -> list[Turn]:
    """Render the supervised assistant turns as text.

    Raises:
        ConversationError: the chat template refuses the conversation or is not a Harmony template.
    """
    found = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    return [_turn(conversation, i, rendering) for i in (found if rendering.every_turn else found[-1:])]


def tokenize(turns: list[Turn], rendering: Rendering) -> list[dict[str, list[int]]]:
    """Convert turns to `input_ids` and `labels`. Pass many turns at once: the tokenizer processes them in parallel."""
    if not turns:
        return []
    texts = [text for turn in turns for text in (turn.prompt, turn.completion)]
    ids = rendering.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [
        {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}
        for prompt, completion in zip(ids[::2], ids[1::2], strict=True)
    ]


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
        reasoning_language=_stated_language(messages),
    )


def render_prompt(conversation: Conversation, rendering: Rendering) -> str:
    """Render a conversation as text. The text ends where the next assistant turn begins.

    Raises:
        ConversationError: the chat template refuses the conversation.
    """
    return _render(conversation.messages, conversation, rendering, for_generation=True)


def _turn(conversation: Conversation, index: int, rendering: Rendering) -> Turn:
    messages = conversation.messages
    prompt = _render(messages[:index], conversation, rendering, for_generation=True)
    # Render the completion without its history. Before a final answer, the template drops the reasoning of earlier tool
    # calls from the history. The prompt still has this reasoning, so the two texts would not match.
    alone = _render([*_PLACEHOLDER, messages[index]], conversation, rendering, for_generation=False)
    opening = _render(_PLACEHOLDER, conversation, rendering, for_generation=True)
    if not alone.startswith(opening) or not alone.endswith(STOP_TOKENS):
        raise ConversationError(
            "the tokenizer's chat template is not a Harmony template: an assistant turn must begin with the generation"
            f" prompt and end with {' or '.join(STOP_TOKENS)}"
        )
    return Turn(prompt, alone[len(opening) :])


def _render(messages: list[Message], conversation: Conversation, rendering: Rendering, *, for_generation: bool) -> str:
    from jinja2 import TemplateError

    language = conversation.reasoning_language or rendering.reasoning_language
    # Without an identity, leave `model_identity` undefined, because the template would render None as text.
    identity = {} if rendering.model_identity is None else {"model_identity": rendering.model_identity}
    try:
        return rendering.tokenizer.apply_chat_template(
            add_language(messages, language),
            tools=conversation.tools,
            tokenize=False,
            add_generation_prompt=for_generation,
            reasoning_effort=conversation.reasoning_effort or rendering.reasoning_effort,
            # The template calls `strftime_now` to get today's date. The argument replaces that function.
            strftime_now=lambda _: rendering.conversation_date,
            **identity,
        )
    except (TemplateError, TypeError, AttributeError) as error:
        raise ConversationError(f"the chat template refuses it: {error}") from error


def add_language(messages: list[Message], language: str | None) -> list[Message]:
    """Insert the line "reasoning language: …" before the instructions, unless their first line names a language."""
    if language is None or _stated_language(messages) is not None:
        return messages
    line = f"{_LANGUAGE_LINE} {language}"
    if messages and messages[0]["role"] in _INSTRUCTIONS:
        opening, *rest = messages
        text = f"{line}\n\n{opening['content']}" if opening["content"] else line
        return [cast(Message, {**opening, "content": text}), *rest]
    return [{"role": "system", "content": line}, *messages]


def _stated_language(messages: list[Message]) -> str | None:
    """Return the language that the first line of the instructions names, or None."""
    if not messages or messages[0]["role"] not in _INSTRUCTIONS:
        return None
    key, colon, language = messages[0]["content"].partition("\n")[0].partition(":")
    return language.strip() if f"{key.strip().lower()}{colon}" == _LANGUAGE_LINE else None


def _message(index: int, message: object) -> Message:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise ConversationError(f"{where} is a {type(message).__name__}, not an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise ConversationError(f"{where} has the unknown role {role!r}; roles are {', '.join(ROLES)}")
    tool_calls = message.get("tool_calls") or None
    cleaned: Message = {"role": role, "content": _text(where, "content", message, tool_calls is not None)}
    if message.get("thinking"):
        if role != "assistant":
            raise ConversationError(f"{where} has 'thinking', but its role is {role!r}, not 'assistant'")
        cleaned["thinking"] = _text(where, "thinking", message, False)
    if tool_calls is not None:
        cleaned["tool_calls"] = [_tool_call(where, role, tool_calls)]
        if cleaned["content"] and cleaned.get("thinking"):
            raise ConversationError(f"{where} calls a tool: put its reasoning in 'thinking' or 'content', not both")
    return cleaned


def _text(where: str, key: str, message: Mapping[str, object], may_be_absent: bool) -> str:
    text = message.get(key)
    if text is None and may_be_absent:
        return ""
    if not isinstance(text, str):
        raise ConversationError(f"{where}.{key} is {type(text).__name__}, not text")
    _check_text(f"{where}.{key}", text)
    return text


def _check_text(where: str, text: str) -> None:
    special = next((token for token in SPECIAL_TOKENS.values() if token in text), None)
    if special is not None:
        raise ConversationError(f"{where} contains the special token {special}, which would end the message")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(f"{where} is not valid Unicode: it contains half of a surrogate pair") from error


def _check_json(where: str, value: object) -> None:
    """Check that a value consists only of JSON types, and check all text in it, including keys."""
    if isinstance(value, str):
        _check_text(where, value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_json(where, key)
            _check_json(where, inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_json(where, inner)
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise ConversationError(f"{where} has a {type(value).__name__}, which is not a JSON type")


def _drop_nulls(value: object) -> object:
    """Drop keys whose value is None. Arrow adds such keys: it gives all objects of a column the same keys."""
    if isinstance(value, dict):
        return {key: _drop_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_drop_nulls(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _tool_call(where: str, role: str, tool_calls: object) -> ToolCall:
    if role != "assistant":
        raise ConversationError(f"{where} has 'tool_calls', but its role is {role!r}, not 'assistant'")
    if not isinstance(tool_calls, (list, tuple)) or len(tool_calls) != 1:
        raise ConversationError(f"{where}.tool_calls must be a list of exactly one call, as Harmony requires")
    call = tool_calls[0]
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ConversationError(f"{where}.tool_calls[0] has no function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI's API gives arguments as JSON text, but the template expects an object
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ConversationError(f"{where}.tool_calls[0].arguments is not valid JSON ({error})") from error
    else:
        arguments = _drop_nulls(arguments)
    _check_json(f"{where}.tool_calls[0]", [function["name"], arguments])
    return {"type": "function", "function": {"name": function["name"], "arguments": cast(Json, arguments or {})}}


def _merge_instructions(messages: list[Message]) -> list[Message]:
    """Join the leading system and developer messages into one, because the template keeps only the first of them."""
    leading = 0
    while leading < len(messages) and messages[leading]["role"] in _INSTRUCTIONS:
        leading += 1
    for i, message in enumerate(messages[leading:], leading):
        if message["role"] in _INSTRUCTIONS:
            raise ConversationError(
                f"messages[{i}] is a {message['role']} message in mid-conversation, which the template would drop"
            )
    if leading < 2:
        return messages
    text = "\n\n".join(message["content"] for message in messages[:leading])
    return [{"role": "developer", "content": text}, *messages[leading:]]


def _check_order(messages: list[Message], needs_answer: bool) -> None:
    if needs_answer and not any(message["role"] == "assistant" for message in messages):
        raise ConversationError("has no assistant message: there is nothing to learn")
    if messages[-1]["role"] in _INSTRUCTIONS:
        raise ConversationError("has only instructions and no user message")
    if messages[0]["role"] == "assistant":
        raise ConversationError("begins with an assistant message, so there is no question before it")
    for i, message in enumerate(messages):
        if message["role"] == "tool" and not any("tool_calls" in earlier for earlier in messages[:i]):
            raise ConversationError("has a tool message without an earlier assistant message with 'tool_calls'")


def _tools(tools: object) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ConversationError(f"'tools' is not valid JSON ({error})") from error
    if not tools:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in tools):
        raise ConversationError("'tools' is not a list of function schemas")
    schemas = [_drop_nulls(tool.get("function") or tool) for tool in tools]
    for i, schema in enumerate(schemas):
        for key in ("name", "description"):
            if not isinstance(schema, dict) or not isinstance(schema.get(key), str):
                called = schema.get("name") if isinstance(schema, dict) else schema
                raise ConversationError(f"tools[{i}] ({called!r}) has no {key}, which the chat template needs")
    _check_json("'tools'", schemas)
    return [{"type": "function", "function": schema} for schema in schemas]


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
    _check_text("'reasoning_language'", language)
    stated = _stated_language(messages)
    if stated is not None and stated.lower() != language.strip().lower():
        raise ConversationError(
            f"'reasoning_language' is {language!r}, but its instructions begin with '{_LANGUAGE_LINE} {stated}'"
        )
    return language.strip()
