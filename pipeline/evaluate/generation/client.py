"""Requests to a server with OpenAI's API: several at a time, repeated where it may help."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from pipeline.config import ServerConfig
from pipeline.errors import UserError
from pipeline.runs.console import progress

_FIRST_WAIT_SECONDS = 0.5
_CONNECT_SECONDS = 10.0
_SHOWN_CHARACTERS = 300
_KEY_REFUSED = (401, 403)
_TOO_MANY = 429
_SERVER_FAILED = 500

T = TypeVar("T")


def address(url: str) -> str:
    """Of the API, without a slash at its end; a server's bare address stands for /v1 below it."""
    url = url.rstrip("/")
    return url if urlsplit(url).path else f"{url}/v1"


def model_of(settings: ServerConfig, key: str) -> str:
    """The model that the settings name; where they name none, the one that the server says it has.

    Args:
        settings: of the server; it has a url.
        key: of the settings, for messages.

    Raises:
        UserError: no server answers there, or it has none or several models.
    """
    if settings.model is not None:
        return settings.model
    url = address(str(settings.url))
    names = asyncio.run(_models(settings, key))
    if len(names) != 1:
        have = f"has several models ({', '.join(names)})" if names else "names no model"
        raise UserError(f"{key}.url={url}: the server {have}. Say which: {key}.model=<name>.")
    return names[0]


def for_each(
    settings: ServerConfig, key: str, todo: Sequence[T], work: Callable[["Client", T], Awaitable[None]], what: str
) -> None:
    """Do `work` for everything that is to be done, `settings.concurrency` at a time.

    Args:
        settings: of the server.
        key: of the settings, for messages.
        todo: what there is to do.
        work: sends requests, and keeps what comes.
        what: is done, for the progress line.

    Raises:
        UserError: the first that `work` raised; whatever else was under way is given up.
    """
    if todo:
        asyncio.run(_for_each(settings, key, todo, work, what))


async def _for_each(
    settings: ServerConfig, key: str, todo: Sequence[T], work: Callable[["Client", T], Awaitable[None]], what: str
) -> None:
    room = asyncio.Semaphore(settings.concurrency)

    async def one(client: Client, item: T) -> None:
        async with room:
            await work(client, item)

    async with Client(settings, key) as client:
        tasks = [asyncio.create_task(one(client, item)) for item in todo]
        try:
            for done in progress(asyncio.as_completed(tasks), total=len(tasks), what=what, unit="answer"):
                await done
        except UserError as error:
            raise UserError(f"{error} The answers so far are kept: the same command goes on from there.") from error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _models(settings: ServerConfig, key: str) -> list[str]:
    def names(reply: Any) -> list[str]:
        return [str(model["id"]) for model in reply["data"]]

    async with Client(settings, key) as client:
        return await client.send("GET", "/models", None, names, "the server's list of models")


class Client:
    """A connection to one server."""

    def __init__(self, settings: ServerConfig, key: str) -> None:
        """
        Args:
            settings: of the server.
            key: of the settings, for messages: `evaluate.endpoint`.

        Raises:
            UserError: the variable that should hold the key is not set.
        """
        self._settings = settings
        self._url = address(str(settings.url))
        self._name = key
        self._key = key_of(settings, key)
        connect_seconds = min(_CONNECT_SECONDS, settings.timeout_seconds)
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(settings.timeout_seconds, connect=connect_seconds, pool=None),
            limits=httpx.Limits(max_connections=settings.concurrency),
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def send(self, method: str, path: str, body: Any, read: Callable[[Any], T], what: str, hint: str = "") -> T:
        """One request, and what `read` makes of the JSON that answers it.

        Args:
            method: of HTTP.
            path: below the address.
            body: sent as JSON.
            read: raises KeyError, IndexError or TypeError where the reply is something else.
            what: is asked for, for messages.
            hint: what else may help where it is refused.

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
                    raise self.error(f"{what} was refused with {problem}", self._remedy(response.status_code) + hint)
            if attempt + 1 < attempts:
                backoff = _FIRST_WAIT_SECONDS * 2**attempt
                await asyncio.sleep(min(backoff if wait is None else wait, self._settings.timeout_seconds))
        raise self.error(
            f"{what} did not come in {attempts} attempts ({problem})",
            f"Is the server up, and not overloaded? {self._name}.timeout_seconds, .retries and .concurrency say how"
            " patient to be and how much to ask at a time.",
        )

    def error(self, problem: str, remedy: str) -> UserError:
        """The error for something that is wrong with the server."""
        return UserError(f"{self._name}.url={self._url}: {problem}. {remedy}")

    def _read(self, response: httpx.Response, read: Callable[[Any], T], what: str) -> T:
        try:
            return read(response.json())
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise self.error(
                f"{what} is not what OpenAI's API promises ({error!r}): {self._shown(response)}",
                "Does the address end where the API begins, as in http://localhost:8000/v1?",
            ) from error

    def _remedy(self, status: int) -> str:
        if status in _KEY_REFUSED:
            return f"Give a key that it accepts: {self._name}.api_key_env=<the variable that holds it>."
        return (
            f"Does the address end where the API begins (http://localhost:8000/v1), and is {self._name}.model served?"
        )

    def _told(self, error: httpx.RequestError) -> str:
        if isinstance(error, httpx.TimeoutException):
            return f"no answer within {self._name}.timeout_seconds={self._settings.timeout_seconds}"
        return self._without_key(str(error)) or type(error).__name__

    def _shown(self, response: httpx.Response) -> str:
        """The beginning of what came, on one line."""
        text = " ".join(self._without_key(response.text).split())
        return f"{text[:_SHOWN_CHARACTERS]}{' …' if len(text) > _SHOWN_CHARACTERS else ''}" or "nothing"

    def _without_key(self, text: str) -> str:
        """Servers may quote the key that they refuse."""
        return text.replace(self._key, "***") if self._key else text


def key_of(settings: ServerConfig, key: str) -> str | None:
    """The server's key, from the environment; None if none is to be sent.

    Args:
        settings: of the server.
        key: of the settings, for messages.

    Raises:
        UserError: the variable that should hold it is not set, or holds what is no key.
    """
    if settings.api_key_env is None:
        return None
    setting = f"{key}.api_key_env={settings.api_key_env}"
    found = os.environ.get(settings.api_key_env, "").strip()  # a file read into the variable ends with a line break
    if not found:
        raise UserError(f"{setting}: the environment has no such variable, or an empty one.")
    if not found.isascii() or not found.isprintable():
        raise UserError(f"{setting}: holds characters that a key cannot have.")
    return found


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
