"""Replies of servers with OpenAI's API: reading them, and the errors for a reply that is missing or unusable."""

from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx

_SHOWN_CHARACTERS = 300
_TOO_MANY = 429
_SERVER_FAILED = 500
_NOT_OPENAI = (ValueError, KeyError, IndexError, TypeError, AttributeError)
"""Errors that a `read` function raises for an unexpected reply."""

T = TypeVar("T")
Reply = TypeVar("Reply")
"""The form of reply that a `read` function expects. The reply is not checked before `read` is called."""


class NoAnswerError(Exception):
    """A request got no usable answer.

    Attributes:
        problem: a description of the failure. The error's message consists of the address and this description.
    """

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(f"{url}: {problem}")
        self.problem = problem


class StatusError(NoAnswerError):
    """The server answered with an HTTP error.

    Attributes:
        status: the HTTP status.
        wait_seconds: how long the server asks to wait before the next attempt, or None.
    """

    def __init__(self, response: httpx.Response, secret: str | None) -> None:
        self.status = response.status_code
        self.wait_seconds = _retry_after(response)
        super().__init__(str(response.url), f"status {self.status}: {_beginning(response.text, secret)}")

    @property
    def is_temporary(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status == _TOO_MANY or self.status >= _SERVER_FAILED


class UnexpectedReplyError(NoAnswerError):
    """The server's reply does not have the form of OpenAI's API."""


def read_reply(response: httpx.Response, read: Callable[[Reply], T], secret: str | None) -> T:
    """Read a successful response with `read`.

    Raises:
        StatusError: the response is an HTTP error.
        UnexpectedReplyError: the response is not JSON, or `read` cannot read it.
    """
    if not response.is_success:
        raise StatusError(response, secret)
    try:
        return read(response.json())
    except _NOT_OPENAI as error:
        raise UnexpectedReplyError(
            str(response.url),
            f"not what OpenAI's API promises ({error!r}): {_beginning(response.text, secret)}",
        ) from error


def no_answer(url: str, error: httpx.RequestError, limit: str, secret: str | None) -> NoAnswerError:
    """Make the error for a request that got no response."""
    if isinstance(error, httpx.TimeoutException):
        return NoAnswerError(url, f"no answer within {limit}")
    return NoAnswerError(url, _without(secret, str(error)) or type(error).__name__)


def _beginning(text: str, secret: str | None) -> str:
    """Return the beginning of a text on one line, without the API key."""
    line = " ".join(_without(secret, text).split())
    return f"{line[:_SHOWN_CHARACTERS]}{' …' if len(line) > _SHOWN_CHARACTERS else ''}" or "nothing"


def _without(secret: str | None, text: str) -> str:
    """Mask the API key in a text. Some servers quote the key that they refuse."""
    return text.replace(secret, "***") if secret else text


def _retry_after(response: httpx.Response) -> float | None:
    """Return how many seconds the server asks to wait. Return None if it does not ask.

    The header Retry-After has a number of seconds or a date (RFC 9110, 10.2.3).
    """
    text = response.headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (until - datetime.now(timezone.utc)).total_seconds())
