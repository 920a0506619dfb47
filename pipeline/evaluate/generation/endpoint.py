"""Answers of a model on a server with OpenAI's API: vLLM, SGLang, TensorRT-LLM and others.

Two ways to ask (APIS). `completions` sends the prompt as tokens, rendered here exactly as training had it, and reads
the completion with its special tokens; vLLM and SGLang can be told to leave those in. `chat` sends messages: the server
renders them itself, so that the date and the identity in its system message are its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

from pipeline.config import EndpointApi, EndpointConfig, GenerationConfig
from pipeline.errors import UserError
from pipeline.evaluate.generation import chat, client, completions
from pipeline.evaluate.generation.client import Client
from pipeline.evaluate.generation.journal import Journal
from pipeline.evaluate.generation.prompts import Question
from pipeline.evaluate.transcripts import Transcript

KEY = "evaluate.endpoint"
_TAKES_NO_TOKENS = f" Or does it take no tokens? Then use {KEY}.api=chat."


@dataclass(frozen=True)
class Served:
    """A model on a server, as a subject of evaluation.

    Attributes:
        name: among the results.
        url: of the API, without a slash at its end.
        model: the server's name for it.
        api: the name of its row in APIS.
    """

    name: str
    url: str
    model: str
    api: str = EndpointApi.completions.name

    @property
    def fingerprint(self) -> str:
        """Of the address and the name: what the server really runs cannot be known."""
        return xxhash.xxh3_128_hexdigest(f"{self.url}\0{self.model}\0{self.api}".encode())


class Api(NamedTuple):
    """A way to ask.

    Attributes:
        path: below the address.
        request: (model, question, its prompt's tokens, settings) -> body.
        transcript: (reply, question, seed) -> what it says; KeyError, IndexError or TypeError if it is something else.
        is_rendered_here: whether it takes tokens.
        hint: what may help a server that refuses.
    """

    path: str
    request: Callable[[str, Question, list[int], GenerationConfig], dict[str, Any]]
    transcript: Callable[[Any, Question, int | None], Transcript]
    is_rendered_here: bool
    hint: str = ""


APIS = {
    EndpointApi.completions.name: Api(
        "/completions", completions.request, completions.transcript, is_rendered_here=True, hint=_TAKES_NO_TOKENS
    ),
    EndpointApi.chat.name: Api("/chat/completions", chat.request, chat.transcript, is_rendered_here=False),
}


def find(settings: EndpointConfig) -> Served:
    """The model that `evaluate.endpoint` names; where it names none, the one that the server says it has.

    Raises:
        UserError: no server answers there, or it has none or several models.
    """
    assert settings.url is not None
    return Served(settings.name, client.address(settings.url), client.model_of(settings, KEY), settings.api.name)


def ask(
    served: Served,
    endpoint: EndpointConfig,
    settings: GenerationConfig,
    asked: Sequence[tuple[Question, list[int]]],
    journal: Journal[Transcript],
) -> None:
    """Answer what the journal does not have yet, several questions at a time; each answer is kept as it comes.

    Args:
        served: the model.
        endpoint: settings of its server.
        settings: how it answers.
        asked: questions with their prompts' tokens, which are empty where the API takes none.
        journal: of the answers.

    Raises:
        UserError: the server is not there, is too slow, refuses, or answers rubbish. What came before is kept.
    """
    api = APIS[served.api]

    async def answer(connection: Client, pair: tuple[Question, list[int]]) -> None:
        question, token_ids = pair
        body = api.request(served.model, question, token_ids, settings)

        def read(reply: Any) -> Transcript:
            return api.transcript(reply, question, body.get("seed"))

        where = question.prompt.conversation.where
        journal.add([await connection.send("POST", api.path, body, read, f"the answer to {where}", api.hint)])

    todo = [pair for pair in asked if pair[0].key not in journal]
    client.for_each(endpoint, KEY, todo, answer, f"answers of {served.name}")
    if api.is_rendered_here:
        _raise_if_stripped(served, [journal[question.key] for question, _ in asked])


def _raise_if_stripped(served: Served, answers: Sequence[Transcript]) -> None:
    """Servers that do not know `skip_special_tokens` pass over it, and nothing could be read of what they send."""
    texts = [str(answer.completion).removesuffix("<|return|>").removesuffix("<|call|>") for answer in answers]
    if texts and all("<|" not in text for text in texts):  # the last may have been added here
        raise UserError(
            f"{KEY}.url={served.url}: no answer has a special token, so that reasoning and answer cannot be told apart:"
            f" this server leaves them out, whatever it is asked. Use {KEY}.api=chat."
        )
