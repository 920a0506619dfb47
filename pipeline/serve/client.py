"""Requests to the engine that stage=serve has just started on this machine."""

from pipeline.config import DataConfig, GenerationConfig, ServeConfig
from pipeline.data.conversations import Conversation, drop_answer
from pipeline.evaluate.generation import chat
from pipeline.evaluate.generation.client import ModelList, local_status, model_names, send_local
from pipeline.evaluate.generation.prompts import Prompt, Question
from pipeline.evaluate.transcripts import Parsed, Transcript, parse

_HEALTH_SECONDS = 5.0
_OK = 200
_LIMIT = "serve.answer_seconds"


def is_up(health: str) -> bool:
    """Whether the engine answers with status 200 at its health address."""
    return local_status(health, _HEALTH_SECONDS) == _OK


def model_name(api: str, seconds: float) -> str:
    """Ask the engine under which name it serves the model.

    Raises:
        NoAnswerError: the engine does not answer in time, or names no model.
    """

    def first(reply: ModelList) -> str:
        return model_names(reply)[0]

    return send_local("GET", f"{api}/models", None, first, seconds=seconds, limit=_LIMIT)


def ask(api: str, model: str, serve: ServeConfig, data: DataConfig) -> Transcript:
    """Ask the engine `serve.question`, with greedy decoding.

    Raises:
        NoAnswerError: no answer within `serve.answer_seconds`, an HTTP error, or a reply in another form.
    """
    conversation = Conversation([{"role": "user", "content": serve.question}])
    asked = drop_answer(conversation, data.reasoning_effort.name, data.reasoning_language)
    question = Question(Prompt("serve.question", asked, {}), 0)
    body = chat.request(model, question, [], GenerationConfig(max_new_tokens=serve.max_new_tokens))

    def read(reply: chat.Reply) -> Transcript:
        return chat.transcript(reply, question, None)

    return send_local("POST", f"{api}/chat/completions", body, read, seconds=serve.answer_seconds, limit=_LIMIT)


def channels(answer: Transcript) -> Parsed:
    """Return the answer, split by channel.

    The answer is parsed only if the engine left Harmony's special tokens in it. Otherwise the engine has split it.
    """
    if answer.answer is not None and "<|channel|>" in answer.answer:
        return parse(answer.answer)
    return Parsed(answer.reasoning, answer.answer, answer.tool_calls)
