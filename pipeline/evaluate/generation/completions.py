"""OpenAI's completions API: build a request from a prompt's tokens, and read a transcript from a reply."""

from typing import TypedDict

from pipeline.checkpoints.gpt_oss import STOP_TOKENS
from pipeline.config import GenerationConfig
from pipeline.evaluate.generation.chat import Usage
from pipeline.evaluate.generation.prompts import Question
from pipeline.evaluate.transcripts import Transcript, calls_tool
from pipeline.runs.json_files import Json

_RETURN, _CALL = "<|return|>", "<|call|>"


class _Choice(TypedDict):
    text: str
    finish_reason: str


class Reply(TypedDict):
    """The fields that are read from the reply to POST /completions. Nothing checks that the reply has these fields."""

    choices: list[_Choice]
    usage: Usage


def request(
    model: str, question: Question, token_ids: list[int], settings: GenerationConfig, _: str = ""
) -> dict[str, Json]:
    """Build the body of POST /completions. The tokens have the instructions already, so their role is not used."""
    body: dict[str, Json] = {
        "model": model,
        "prompt": token_ids,
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "stop": list(STOP_TOKENS),
        # These three fields extend OpenAI's API. vLLM and SGLang support the first two. Only vLLM supports the third.
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    if settings.temperature:
        body["seed"] = question.seed(settings.seed)
    return body


def transcript(reply: Reply, question: Question, seed: int | None) -> Transcript:
    """Read the answer in a reply to `request`.

    Raises:
        KeyError, IndexError, TypeError: the reply is unexpected.
    """
    choice = reply["choices"][0]
    text, finish = choice["text"], str(choice["finish_reason"])
    if not isinstance(text, str):
        raise TypeError(f"text is a {type(text).__name__}, not text")
    text = text.encode(errors="replace").decode()  # JSON can hold half of a surrogate pair; a file in UTF-8 cannot
    if finish == "stop" and not text.endswith(STOP_TOKENS):
        text += _CALL if calls_tool(text) else _RETURN  # the server removed the stop token
    tokens = int(reply["usage"]["completion_tokens"])
    return question.transcript(text, finish, tokens, seed)
