"""Generate answers with a model on a server that has OpenAI's API, such as vLLM, SGLang or TensorRT-LLM.

There are two APIs:
- `completions`: this process renders the prompt exactly as in training, and sends its tokens. The reply must contain
  the completion's special tokens. The request asks the server to keep them, and vLLM and SGLang support this.
- `chat`: this process sends messages. The server renders them, with its own date and identity in the system message.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

from pipeline.config import EndpointApi, EndpointConfig, GenerationConfig, InstructionsRole
from pipeline.errors import UserError
from pipeline.evaluate.generation import chat, client, completions
from pipeline.evaluate.generation.client import Client
from pipeline.evaluate.generation.journal import Journal
from pipeline.evaluate.generation.prompts import Question
from pipeline.evaluate.transcripts import Transcript
from pipeline.runs.json_files import Json

KEY = "evaluate.endpoint"
_NO_TOKENS = f" If the server does not accept tokens, use {KEY}.api=chat."


@dataclass(frozen=True)
class Served:
    """A model on a server, as a subject of evaluation.

    Attributes:
        name: the model's name in the results.
        url: address of the API, without a slash at its end.
        model: the server's name for the model.
        api: the name of the API, a key of APIS.
        instructions_role: the role of instructions in messages of the chat API.
    """

    name: str
    url: str
    model: str
    api: str = EndpointApi.completions.name
    instructions_role: str = InstructionsRole.developer.name

    @property
    def fingerprint(self) -> str:
        """A hash of the address, the model's name and how it is asked. The server's weights are unknown."""
        role = "" if APIS[self.api].is_rendered_here else f"\0{self.instructions_role}"
        return xxhash.xxh3_128_hexdigest(f"{self.url}\0{self.model}\0{self.api}{role}".encode())


class Api(NamedTuple):
    """An API of a server.

    Attributes:
        path: path below the API's address.
        request: function (model, question, the prompt's token ids, settings, role of instructions) -> body of the
            request.
        transcript: function (reply, question, seed) -> transcript. The function raises KeyError, IndexError or
            TypeError for an unexpected reply.
        is_rendered_here: whether this process renders the prompts and sends them as tokens.
        hint: text to append to the error message if the server refuses a request.
    """

    path: str
    request: Callable[[str, Question, list[int], GenerationConfig, str], dict[str, Json]]
    transcript: Callable[[Any, Question, int | None], Transcript]
    is_rendered_here: bool
    hint: str = ""


APIS = {
    EndpointApi.completions.name: Api(
        "/completions", completions.request, completions.transcript, is_rendered_here=True, hint=_NO_TOKENS
    ),
    EndpointApi.chat.name: Api("/chat/completions", chat.request, chat.transcript, is_rendered_here=False),
}


def find(settings: EndpointConfig) -> Served:
    """Find the model that `evaluate.endpoint` names, or the server's only model if it names none.

    Raises:
        UserError: `evaluate.endpoint` names no model, and the server's only model cannot be determined. For example,
            the server does not answer, or has several models.
    """
    assert settings.url is not None
    url, model = client.address(settings.url), client.find_model(settings, KEY)
    return Served(settings.name, url, model, settings.api.name, settings.instructions_role.name)


def ask(
    served: Served,
    asked: Sequence[tuple[Question, list[int]]],
    journal: Journal[Transcript],
    *,
    endpoint: EndpointConfig,
    settings: GenerationConfig,
) -> None:
    """Ask the questions that have no answer in the journal, several at a time. Answers are stored as they arrive.

    Args:
        served: the model.
        asked: pairs of a question and its prompt's token ids. The ids are empty for the chat API.
        journal: the journal that stores the answers.
        endpoint: the server's settings.
        settings: the settings of decoding.

    Raises:
        UserError: the server does not answer, is too slow, refuses a request, or sends an unexpected reply. Answers
            that arrived before the error are kept.
    """
    api = APIS[served.api]

    async def answer(connection: Client, pair: tuple[Question, list[int]]) -> None:
        question, token_ids = pair
        body = api.request(served.model, question, token_ids, settings, served.instructions_role)
        seed = question.seed(settings.seed) if settings.temperature else None  # the same seed as in the body
        what = f"the answer to {question.prompt.conversation.where}"

        def read(reply: Json) -> Transcript:
            return api.transcript(reply, question, seed)

        journal.add([await connection.send("POST", api.path, body, read, what=what, hint=api.hint)])

    todo = [pair for pair in asked if pair[0].key not in journal]
    client.for_each(endpoint, KEY, todo, answer, what=f"answers of {served.name}")
    if api.is_rendered_here:
        _raise_if_stripped(served, [journal[question.key] for question, _ in asked])


def _raise_if_stripped(served: Served, answers: Sequence[Transcript]) -> None:
    """Raise a UserError if all answers lack special tokens, because such answers have no separate channels.

    Servers that do not support `skip_special_tokens` ignore this setting and remove the special tokens.
    """
    # A stop token at the end does not count: `completions.transcript` adds one if the server has removed it.
    texts = [str(answer.completion).removesuffix("<|return|>").removesuffix("<|call|>") for answer in answers]
    if texts and all("<|" not in text for text in texts):
        raise UserError(
            f"{KEY}.url={served.url}: no answer has a special token, so reasoning and answer cannot be separated."
            f" The request asked to keep special tokens, but this server removes them. Use {KEY}.api=chat."
        )
