"""OpenAI's completions API: a prompt's tokens as the body of a request, and what the completion says."""

from typing import Any

from pipeline.checkpoints.gpt_oss import STOP_TOKENS
from pipeline.config import GenerationConfig
from pipeline.evaluate.generation.prompts import Question
from pipeline.evaluate.transcripts import Transcript, calls_tool

_RETURN, _CALL = "<|return|>", "<|call|>"


def request(model: str, question: Question, token_ids: list[int], settings: GenerationConfig) -> dict[str, Any]:
    """The body of POST /completions."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": token_ids,
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "stop": list(STOP_TOKENS),
        # Not of OpenAI's API, but known to vLLM and SGLang; the last to vLLM alone.
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    if settings.temperature:
        body["seed"] = question.seed(settings.seed)
    return body


def transcript(reply: Any, question: Question, seed: int | None) -> Transcript:
    """What the reply to `request` says.

    Raises:
        KeyError, IndexError, TypeError: it is something else.
    """
    choice = reply["choices"][0]
    text, finish = choice["text"], str(choice["finish_reason"])
    if not isinstance(text, str):
        raise TypeError(f"text is a {type(text).__name__}, not text")
    text = text.encode(errors="replace").decode()  # JSON can hold half of a surrogate pair, which no file can
    if finish == "stop" and not text.endswith(STOP_TOKENS):
        text += _CALL if calls_tool(text) else _RETURN  # it was one of the two, and the server kept it to itself
    tokens = int(reply["usage"]["completion_tokens"])
    return question.transcript(text, finish, tokens, seed)
