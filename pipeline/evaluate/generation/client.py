"""Requests to servers with OpenAI's API.

`Client` sends many requests at a time, and retries requests that fail temporarily. `send_local` sends a single request
to an engine on this machine. Both read replies with the same code, which raises a NoAnswerError for every problem.
`Client` turns that error into a UserError.
"""

import asyncio
import os
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypedDict, TypeVar
from urllib.parse import urlsplit

import httpx

from pipeline.config import ServerConfig
from pipeline.errors import UserError
from pipeline.evaluate.generation.replies import (
    NoAnswerError,
    Reply,
    StatusError,
    UnexpectedReplyError,
    no_answer,
    read_reply,
)
from pipeline.runs.console import progress
from pipeline.runs.json_files import Json

_FIRST_WAIT_SECONDS = 0.5
_CONNECT_SECONDS = 10.0
_KEY_REFUSED = (401, 403)
_CHECK_ADDRESS = "Does the address end with the API's base path, as in http://localhost:8000/v1?"
T = TypeVar("T")
R = TypeVar("R")


class _Model(TypedDict):
    id: str


class ModelList(TypedDict):
    """The reply to GET /models."""

    data: list[_Model]


def address(url: str) -> str:
    """Normalize the API's address: remove a slash at the end, and append /v1 if the address has no path."""
    url = url.rstrip("/")
    return url if urlsplit(url).path else f"{url}/v1"


def find_model(settings: ServerConfig, key: str) -> str:
    """Return the model's name from the settings. If the settings have no name, ask the server for its only model.

    Args:
        settings: the server's settings, with a url.
        key: the configuration key of these settings, for messages, such as `evaluate.endpoint`.

    Raises:
        UserError: the settings have no name, and the server's only model cannot be determined. For example, the server
            does not answer, or has several models.
    """
    if settings.model is not None:
        return settings.model
    url = address(str(settings.url))
    names = _run(_models(settings, key))
    if len(names) != 1:
        have = f"has several models ({', '.join(names)})" if names else "names no model"
        raise UserError(f"{key}.url={url}: the server {have}. Choose one: {key}.model=<name>.")
    return names[0]


def model_names(reply: ModelList) -> list[str]:
    """Read the names of the models that a server lists.

    Raises:
        KeyError, TypeError: the reply is unexpected.
    """
    return [str(model["id"]) for model in reply["data"]]


def for_each(
    settings: ServerConfig, key: str, todo: Sequence[T], work: Callable[["Client", T], Awaitable[None]], *, what: str
) -> None:
    """Call `work` for every item. At most `settings.concurrency` items are in progress at a time.

    Args:
        settings: the server's settings.
        key: the configuration key of these settings, for messages.
        todo: the items.
        work: a function that sends an item's requests and stores the answers.
        what: label of the progress line, such as "answers of <model>".

    Raises:
        UserError: `work` raised a UserError. The first error cancels all other items.
    """
    if todo:
        _run(_for_each(settings, key, todo, work, what=what))


def _run(work: Coroutine[object, object, R]) -> R:
    """Run a coroutine to its end. In a notebook, where this thread has a running event loop, use another thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, thread_name_prefix="requests") as other:
        loop = other.submit(asyncio.new_event_loop).result()
        task = loop.create_task(work)
        done = other.submit(loop.run_until_complete, task)
        try:
            return done.result()
        finally:  # an interrupt ends the requests, too
            loop.call_soon_threadsafe(task.cancel)
            wait([done])
            other.submit(loop.close)


async def _for_each(
    settings: ServerConfig, key: str, todo: Sequence[T], work: Callable[["Client", T], Awaitable[None]], *, what: str
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
            raise UserError(
                f"{error} All answers received so far are kept. Run the same command again to get the other answers."
            ) from error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _models(settings: ServerConfig, key: str) -> list[str]:
    async with Client(settings, key) as client:
        return await client.send("GET", "/models", None, model_names, what="the server's list of models")


@cache
def _trusted() -> ssl.SSLContext:
    """Read the trusted certificates once, because that takes longer than a request to a server on this machine."""
    return httpx.create_ssl_context()


class Client:
    """A connection to one server."""

    def __init__(self, settings: ServerConfig, key: str) -> None:
        """Prepare the connection.

        Args:
            settings: the server's settings.
            key: the configuration key of these settings, for messages, such as `evaluate.endpoint`.

        Raises:
            UserError: the environment variable for the API key is not set.
        """
        self._settings = settings
        self._url = address(str(settings.url))
        self._name = key
        self._key = read_key(settings, key)
        connect_seconds = min(_CONNECT_SECONDS, settings.timeout_seconds)
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(settings.timeout_seconds, connect=connect_seconds, pool=None),
            limits=httpx.Limits(max_connections=settings.concurrency),
            verify=_trusted(),
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Json] | None,
        read: Callable[[Reply], T],
        *,
        what: str,
        hint: str = "",
    ) -> T:
        """Send one request, and return the result of `read` for the reply.

        Args:
            method, path: the HTTP method, and the path below the API's address.
            body: the body of the request, sent as JSON.
            read: a function of the parsed JSON. It raises KeyError, IndexError or TypeError if the form is unexpected.
            what: name of the requested answer, for messages.
            hint: text to append to the error message if the server refuses the request.

        Raises:
            UserError: all attempts failed, the server refused the request, or `read` could not read the reply.
        """
        attempts = self._settings.retries + 1
        for attempt in range(attempts):
            try:
                return await self._attempt(method, path, body, read)
            except UnexpectedReplyError as error:
                raise self.error(f"{what} is {error.problem}", _CHECK_ADDRESS) from error
            except NoAnswerError as error:
                failure = error
            if isinstance(failure, StatusError) and not failure.is_temporary:
                raise self.error(f"{what} was refused with {failure.problem}", self._remedy(failure.status) + hint)
            if attempt + 1 < attempts:
                await asyncio.sleep(self._pause(attempt, failure))
        raise self.error(
            f"{what} did not come in {attempts} attempts ({failure.problem})",
            "Is the server up? Is it overloaded?"
            f" To wait longer, raise {self._name}.timeout_seconds or .retries."
            " To send fewer requests at a time, lower .concurrency.",
        )

    def error(self, problem: str, remedy: str) -> UserError:
        """Make the error for a problem with the server."""
        return UserError(f"{self._name}.url={self._url}: {problem}. {remedy}")

    async def _attempt(self, method: str, path: str, body: Mapping[str, Json] | None, read: Callable[[Reply], T]) -> T:
        url = self._url + path
        try:
            response = await self._http.request(method, url, json=body)
        except httpx.RequestError as error:
            limit = f"{self._name}.timeout_seconds={self._settings.timeout_seconds}"
            raise no_answer(url, error, limit, self._key) from error
        return read_reply(response, read, self._key)

    def _pause(self, attempt: int, failure: NoAnswerError) -> float:
        """Return the seconds until the next attempt. The wait doubles each time, unless the server states one."""
        asked = failure.wait_seconds if isinstance(failure, StatusError) else None
        return min(_FIRST_WAIT_SECONDS * 2**attempt if asked is None else asked, self._settings.timeout_seconds)

    def _remedy(self, status: int) -> str:
        if status in _KEY_REFUSED:
            return f"Give a key that the server accepts: {self._name}.api_key_env=<the variable that holds it>."
        return (
            f"Does the address end with the API's base path, as in http://localhost:8000/v1? Does the server offer"
            f" {self._name}.model?"
        )


def send_local(
    method: str,
    url: str,
    body: Mapping[str, Json] | None,
    read: Callable[[Reply], T],
    *,
    seconds: float,
    limit: str,
) -> T:
    """Send one request to a server on this machine, without a key and without retries.

    Return the result of `read` for the reply.

    Args:
        method: the HTTP method.
        url: the full address.
        body: the body of the request, sent as JSON.
        read: a function that reads the parsed JSON (see `Client.send`).
        seconds: how long to wait for the reply.
        limit: name of the setting that determines `seconds`, for messages.

    Raises:
        NoAnswerError: no answer in time, an HTTP error, or a reply that `read` cannot read.
    """
    try:
        response = _request_local(method, url, body, seconds)
    except httpx.RequestError as error:
        raise no_answer(url, error, f"{limit}={seconds:g}", None) from error
    return read_reply(response, read, None)


def local_status(url: str, seconds: float) -> int | None:
    """Ask a server on this machine for its HTTP status. Return None if it does not answer in time."""
    try:
        return _request_local("GET", url, None, seconds).status_code
    except httpx.RequestError:
        return None


def _request_local(method: str, url: str, body: Mapping[str, Json] | None, seconds: float) -> httpx.Response:
    # A proxy from the environment cannot reach this machine's ports, so trust_env is False.
    # The address is http and needs no certificates, so verify=False saves the time to load them.
    return httpx.request(method, url, json=body, timeout=seconds, trust_env=False, verify=False, follow_redirects=True)


def read_key(settings: ServerConfig, key: str) -> str | None:
    """Read the server's API key from the environment. Return None if the settings name no variable.

    Args:
        settings: the server's settings.
        key: the configuration key of these settings, for messages.

    Raises:
        UserError: the variable is not set, or its value cannot be a key.
    """
    if settings.api_key_env is None:
        return None
    setting = f"{key}.api_key_env={settings.api_key_env}"
    found = os.environ.get(settings.api_key_env, "").strip()  # a key read from a file ends with a line break
    if not found:
        raise UserError(f"{setting}: this environment variable is not set, or empty.")
    if not found.isascii() or not found.isprintable():
        raise UserError(f"{setting}: this environment variable holds characters that a key cannot have.")
    return found
