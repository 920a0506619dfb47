"""OpenAI's chat API: build a request from a question, and read a transcript from a reply."""

import json
from collections.abc import Mapping
from typing import TypedDict, cast

from pipeline.config import GenerationConfig, InstructionsRole
from pipeline.data.conversations import INSTRUCTIONS, Conversation, Function
from pipeline.evaluate.generation.prompts import Question
from pipeline.evaluate.transcripts import Transcript
from pipeline.runs.json_files import Json

_REASONING = ("reasoning_content", "reasoning")
"""The field names that servers use for the reasoning. vLLM has replaced the first name by the second."""


class _Function(TypedDict):
    name: str
    arguments: str


class _Call(TypedDict):
    function: _Function


class _Message(TypedDict, total=False):
    content: str | None
    reasoning: str | None
    reasoning_content: str | None
    tool_calls: list[_Call] | None


class _Choice(TypedDict):
    message: _Message
    finish_reason: str


class Usage(TypedDict):
    """Token counts of a reply."""

    completion_tokens: int


class Reply(TypedDict):
    """The fields that are read from the reply to POST /chat/completions.

    Nothing checks that the reply has these fields.
    """

    choices: list[_Choice]
    usage: Usage


def request(
    model: str,
    question: Question,
    _: list[int],
    settings: GenerationConfig,
    role: str = InstructionsRole.developer.name,
) -> dict[str, Json]:
    """Build the body of POST /chat/completions. The server renders the messages itself, so token ids are not sent.

    Instructions have one role, whichever of the two a row has, because training renders both in the same way. All
    engines render `developer` as Harmony's instructions. TensorRT-LLM writes `system` in place of the first line of
    the system message. vLLM before its pull request 44330 writes it as a second system message.
    """
    conversation = question.prompt.conversation
    body: dict[str, Json] = {
        "model": model,
        "messages": _messages(conversation, role),
        "reasoning_effort": conversation.reasoning_effort,
        "max_tokens": settings.max_new_tokens,  # some servers do not know the newer max_completion_tokens
        "temperature": settings.temperature,
        "top_p": settings.top_p,
    }
    if settings.temperature:
        body["seed"] = question.seed(settings.seed)
    if conversation.tools:
        body["tools"] = cast(Json, conversation.tools)
    return body


def transcript(reply: Reply, question: Question, seed: int | None) -> Transcript:
    """Read the answer in a reply to `request`.

    Raises:
        KeyError, IndexError, TypeError: the reply is unexpected.
    """
    choice = reply["choices"][0]
    message = choice["message"]
    reasoning = (_text(message, name) for name in _REASONING)
    return Transcript(
        prompt_id=question.prompt.prompt_id,
        sample=question.sample,
        messages=question.prompt.conversation.messages,
        expected=question.prompt.expected,
        reasoning=next((text for text in reasoning if text is not None), None),
        answer=_text(message, "content"),
        completion=None,
        finish=str(choice["finish_reason"]),
        tokens=int(reply["usage"]["completion_tokens"]),
        seed=seed,
        tool_calls=[_call(call["function"]) for call in message.get("tool_calls") or ()],
        reference=question.prompt.reference,
    )


def read_content(reply: Reply) -> str | None:
    """Read the text of the reply's message. Return None if the message has no text.

    Raises:
        KeyError, IndexError, TypeError: the reply is unexpected.
    """
    return _text(reply["choices"][0]["message"], "content")


def _text(message: Mapping[str, object], name: str) -> str | None:
    """Return a text field of the message, or None. Servers send a missing text as null, as "" or not at all."""
    text = message.get(name)
    if text is not None and not isinstance(text, str):
        raise TypeError(f"{name} is a {type(text).__name__}, not text")
    # JSON can hold half of a surrogate pair, but a file in UTF-8 cannot. So a question mark replaces the half.
    return text.encode(errors="replace").decode() if text else None


def _call(function: _Function) -> dict[str, str]:
    return {"name": str(function["name"]), "arguments": str(function["arguments"])}


def _messages(conversation: Conversation, role: str) -> list[dict[str, Json]]:
    """Convert the messages to the API's form. A tool's message has the id of the call that it answers."""
    last_call = ""
    calls: dict[str, str] = {}  # function -> id of its last call
    messages = []
    for i, message in enumerate(conversation.messages):
        is_instruction = message["role"] in INSTRUCTIONS
        sent: dict[str, Json] = {"role": role if is_instruction else message["role"], "content": message["content"]}
        if "preamble" in message:  # engines return both texts as one, with a line break in between
            sent["content"] = f"{message['preamble']}\n{message['content']}"
        if "thinking" in message:
            sent["reasoning_content"] = message["thinking"]
        if "tool_calls" in message:
            sent["tool_calls"] = [_sent_call(f"call_{i}", call["function"]) for call in message["tool_calls"]]
            last_call = f"call_{i}"
            calls |= {call["function"]["name"]: last_call for call in message["tool_calls"]}
        if message["role"] == "tool":
            sent["tool_call_id"] = calls[message["name"]] if "name" in message else last_call
        messages.append(sent)
    return messages


def _sent_call(call_id: str, function: Function) -> dict[str, Json]:
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
