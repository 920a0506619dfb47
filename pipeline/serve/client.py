"""Requests to the engine that was just started on this machine."""

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

from pipeline.config import GenerationConfig, PipelineConfig
from pipeline.data import harmony
from pipeline.data.harmony import Conversation
from pipeline.evaluate.generation import chat
from pipeline.evaluate.generation.prompts import Prompt, Question
from pipeline.evaluate.transcripts import Parsed, Transcript, parse

_HEALTH_SECONDS = 5.0
_SHOWN_CHARACTERS = 300
_LOST = (OSError, http.client.HTTPException)  # refused, cut off, too slow; urllib's errors are OSErrors
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know this machine's ports


class NoAnswerError(Exception):
    """The engine did not answer, or not as OpenAI's API promises; says how."""


def is_up(health: str) -> bool:
    """Whether the engine answers there with 200."""
    try:
        with _DIRECT.open(health, timeout=_HEALTH_SECONDS) as response:
            return response.status == http.client.OK
    except _LOST:
        return False


def model_name(api: str, seconds: float) -> str:
    """What the engine calls its model.

    Raises:
        NoAnswerError: no answer, or it names none.
    """
    reply = _send(f"{api}/models", None, seconds)
    try:
        return str(reply["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise _unexpected(f"{api}/models", reply, error) from error


def ask(api: str, model: str, config: PipelineConfig) -> Transcript:
    """The answer to `serve.question`, the likeliest token each time.

    Raises:
        NoAnswerError: no answer within `serve.answer_seconds`, an error, or something else than an answer.
    """
    conversation = Conversation([{"role": "user", "content": config.serve.question}])
    asked = harmony.asked(conversation, config.data.reasoning_effort.name, config.data.reasoning_language)
    question = Question(Prompt("serve.question", asked, {}), 0)
    body = chat.request(model, question, [], GenerationConfig(max_new_tokens=config.serve.max_new_tokens))
    url = f"{api}/chat/completions"
    reply = _send(url, body, config.serve.answer_seconds)
    try:
        return chat.transcript(reply, question, None)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _unexpected(url, reply, error) from error


def channels(answer: Transcript) -> Parsed:
    """Its channels, taken apart here where the engine left Harmony's tokens in the text."""
    if answer.answer is not None and "<|channel|>" in answer.answer:
        return parse(answer.answer)
    return Parsed(answer.reasoning, answer.answer, answer.tool_calls)


def _send(url: str, body: Any, seconds: float) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with _DIRECT.open(request, timeout=seconds) as response:
            text = response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        raise NoAnswerError(f"{url}: status {error.code}: {_shown(error.read().decode(errors='replace'))}") from error
    except _LOST as error:
        raise NoAnswerError(f"{url}: no answer within {seconds:g} s ({error or type(error).__name__})") from error
    try:
        return json.loads(text)
    except ValueError as error:
        raise _unexpected(url, text, error) from error


def _unexpected(url: str, reply: Any, error: Exception) -> NoAnswerError:
    text = reply if isinstance(reply, str) else json.dumps(reply)
    return NoAnswerError(f"{url}: not what OpenAI's API promises ({error!r}): {_shown(text)}")


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return f"{line[:_SHOWN_CHARACTERS]}{' …' if len(line) > _SHOWN_CHARACTERS else ''}" or "nothing"
