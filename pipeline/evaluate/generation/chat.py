"""OpenAI's chat API: a question as the body of a request, and what the reply says."""

import json
from typing import Any

from pipeline.config import GenerationConfig
from pipeline.evaluate.generation.prompts import Question
from pipeline.evaluate.transcripts import Transcript

_REASONING = ("reasoning_content", "reasoning")
"""Where servers put the reasoning; vLLM has changed from the first to the second."""


def request(model: str, question: Question, _: list[int], settings: GenerationConfig) -> dict[str, Any]:
    """The body of POST /chat/completions; the server renders the messages, and no tokens of ours are sent."""
    conversation = question.prompt.conversation
    body = {
        "model": model,
        "messages": _messages(conversation.messages),
        "reasoning_effort": conversation.reasoning_effort,
        "max_tokens": settings.max_new_tokens,  # the newer max_completion_tokens is not known to every server
        "temperature": settings.temperature,
        "top_p": settings.top_p,
    }
    if settings.temperature:
        body["seed"] = question.seed(settings.seed)
    if conversation.tools:
        body["tools"] = conversation.tools
    return body


def transcript(reply: Any, question: Question, seed: int | None) -> Transcript:
    """What the reply to `request` says.

    Raises:
        KeyError, IndexError, TypeError: it is something else.
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
    )


def content(reply: Any) -> str | None:
    """The text of the reply's message.

    Raises:
        KeyError, IndexError, TypeError: it is something else.
    """
    return _text(reply["choices"][0]["message"], "content")


def _text(message: dict[str, Any], name: str) -> str | None:
    """A text that never came is null with some servers, empty with others, and absent with the rest."""
    text = message.get(name)
    if text is not None and not isinstance(text, str):
        raise TypeError(f"{name} is a {type(text).__name__}, not text")
    # JSON can hold half of a surrogate pair, which no file can.
    return text.encode(errors="replace").decode() if text else None


def _call(function: dict[str, Any]) -> dict[str, str]:
    return {"name": str(function["name"]), "arguments": str(function["arguments"])}


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the form of the API, in which a tool's message names the call that it answers."""
    last_call = ""
    made = []
    for i, message in enumerate(messages):
        sent = {"role": message["role"], "content": message["content"]}
        if "thinking" in message:
            sent["reasoning_content"] = message["thinking"]
        if "tool_calls" in message:
            sent["tool_calls"] = [_sent_call(f"call_{i}", call["function"]) for call in message["tool_calls"]]
            last_call = f"call_{i}"
        if message["role"] == "tool":
            sent["tool_call_id"] = last_call
        made.append(sent)
    return made


def _sent_call(call_id: str, function: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
