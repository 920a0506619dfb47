"""Answers of a server with OpenAI's chat API: vLLM, SGLang, TensorRT-LLM and others. The only importer of httpx.

The server renders the conversation itself: the date and the identity in its system message are its own.
"""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx
import xxhash

from pipeline.config import EndpointConfig, GenerationConfig
from pipeline.errors import UserError
from pipeline.generation import chat
from pipeline.generation.journal import Journal
from pipeline.generation.prompts import Question
from pipeline.tracking import progress
from pipeline.transcripts import Transcript

_FIRST_WAIT_SECONDS = 0.5
_CONNECT_SECONDS = 10.0
_SHOWN_CHARACTERS = 300
_KEY_REFUSED = (401, 403)
_TOO_MANY = 429
_SERVER_FAILED = 500


@dataclass(frozen=True)
class Served:
    """A model on a server, as a subject of evaluation.

    Attributes:
        name: among the results.
        url: of the API, without a slash at its end.
        model: the server's name for it.
    """

    name: str
    url: str
    model: str

    @property
    def fingerprint(self) -> str:
        """Of the address and the name: what the server really runs cannot be known."""
        return xxhash.xxh3_128_hexdigest(f"{self.url}\0{self.model}".encode())


def find(settings: EndpointConfig) -> Served:
    """The model that `evaluate.endpoint` names; where it names none, the one that the server says it has.

    Raises:
        UserError: no server answers there, or it has none or several models.
    """
    assert settings.url is not None
    url = settings.url.rstrip("/")
    if not urlsplit(url).path:
        url += "/v1"
    if settings.model is not None:
        return Served(settings.name, url, settings.model)
    names = asyncio.run(_models(settings, url))
    if len(names) != 1:
        have = f"has several models ({', '.join(names)})" if names else "names no model"
        raise UserError(f"evaluate.endpoint.url={url}: the server {have}. Say which: evaluate.endpoint.model=<name>.")
    return Served(settings.name, url, names[0])


def ask(
    served: Served, endpoint: EndpointConfig, settings: GenerationConfig, questions: list[Question], journal: Journal
) -> None:
    """Answer what the journal does not have yet, several questions at a time; each answer is kept as it comes.

    Raises:
        UserError: the server is not there, is too slow, refuses, or answers rubbish. What came before is kept.
    """
    todo = [question for question in questions if question not in journal]
    if todo:
        asyncio.run(_ask(served, endpoint, settings, todo, journal))


async def _models(settings: EndpointConfig, url: str) -> list[str]:
    async with _Client(settings, url) as client:
        return await client.send("GET", "/models", None, chat.models, "the server's list of models")


async def _ask(
    served: Served, endpoint: EndpointConfig, settings: GenerationConfig, todo: list[Question], journal: Journal
) -> None:
    room = asyncio.Semaphore(endpoint.concurrency)

    async def answer(client: _Client, question: Question) -> None:
        async with room:
            journal.add([await client.answer(served.model, question, settings)])

    async with _Client(endpoint, served.url) as client:
        tasks = [asyncio.create_task(answer(client, question)) for question in todo]
        try:
            for done in progress(
                asyncio.as_completed(tasks), total=len(tasks), what=f"answers of {served.name}", unit="answer"
            ):
                await done
        except UserError as error:
            raise UserError(f"{error} The answers so far are kept: the same command goes on from there.") from error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class _Client:
    """Requests to one server, repeated where that may help."""

    def __init__(self, settings: EndpointConfig, url: str) -> None:
        """
        Raises:
            UserError: the variable that should hold the key is not set.
        """
        self._settings = settings
        self._url = url
        self._key = _key(settings.api_key_env)
        connect_seconds = min(_CONNECT_SECONDS, settings.timeout_seconds)
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(settings.timeout_seconds, connect=connect_seconds, pool=None),
            limits=httpx.Limits(max_connections=settings.concurrency),
        )

    async def __aenter__(self) -> "_Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def answer(self, model: str, question: Question, settings: GenerationConfig) -> Transcript:
        """The answer to one question."""
        body = chat.request(model, question, settings)

        def read(reply: Any) -> Transcript:
            return chat.transcript(reply, question, body.get("seed"))

        where = question.prompt.conversation.where
        return await self.send("POST", "/chat/completions", body, read, f"the answer to {where}")

    async def send(self, method: str, path: str, body: Any, read: Callable[[Any], Any], what: str) -> Any:
        """One request, and what `read` makes of the JSON that answers it.

        Raises:
            UserError: no answer in spite of repetitions, a refusal, or not what `read` expects.
        """
        attempts = self._settings.retries + 1
        for attempt in range(attempts):
            try:
                response = await self._http.request(method, self._url + path, json=body)
            except httpx.RequestError as error:
                problem, wait = self._told(error), None
            else:
                if response.is_success:
                    return self._read(response, read, what)
                problem, wait = f"status {response.status_code}: {self._shown(response)}", _retry_after(response)
                if response.status_code != _TOO_MANY and response.status_code < _SERVER_FAILED:
                    raise self._error(f"{what} was refused with {problem}", _remedy(response.status_code))
            if attempt + 1 < attempts:
                backoff = _FIRST_WAIT_SECONDS * 2**attempt
                await asyncio.sleep(min(backoff if wait is None else wait, self._settings.timeout_seconds))
        raise self._error(
            f"{what} did not come in {attempts} attempts ({problem})",
            "Is the server up, and not overloaded? evaluate.endpoint.timeout_seconds, .retries and .concurrency say how"
            " patient to be and how much to ask at a time.",
        )

    def _read(self, response: httpx.Response, read: Callable[[Any], Any], what: str) -> Any:
        try:
            return read(response.json())
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._error(
                f"{what} is not what OpenAI's API promises ({error!r}): {self._shown(response)}",
                "Does the address end where the API begins, as in http://localhost:8000/v1?",
            ) from error

    def _error(self, problem: str, remedy: str) -> UserError:
        return UserError(f"evaluate.endpoint.url={self._url}: {problem}. {remedy}")

    def _told(self, error: httpx.RequestError) -> str:
        if isinstance(error, httpx.TimeoutException):
            return f"no answer within evaluate.endpoint.timeout_seconds={self._settings.timeout_seconds}"
        return self._without_key(str(error)) or type(error).__name__

    def _shown(self, response: httpx.Response) -> str:
        """The beginning of what came, on one line."""
        text = " ".join(self._without_key(response.text).split())
        return f"{text[:_SHOWN_CHARACTERS]}{' …' if len(text) > _SHOWN_CHARACTERS else ''}" or "nothing"

    def _without_key(self, text: str) -> str:
        """Servers may quote the key that they refuse."""
        return text.replace(self._key, "***") if self._key else text


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()  # a file read into the variable ends with a line break
    if not key:
        raise UserError(
            f"evaluate.endpoint.api_key_env={variable}: the environment has no such variable, or an empty one."
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"evaluate.endpoint.api_key_env={variable}: holds characters that a key cannot have.")
    return key


def _remedy(status: int) -> str:
    if status in _KEY_REFUSED:
        return "Give a key that it accepts: evaluate.endpoint.api_key_env=<the variable that holds it>."
    return (
        "Does the address end where the API begins (http://localhost:8000/v1), and is evaluate.endpoint.model served?"
    )


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait: a number or a date (RFC 9110, 10.2.3); None where it does not say."""
    text = response.headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (until - datetime.now(timezone.utc)).total_seconds())
