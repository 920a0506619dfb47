"""Runs code that others wrote, such as a chat template, with a limit of time and of memory."""

import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

Result = TypeVar("Result")
_PAGE = resource.getpagesize()
_SIZE = Path("/proc/self/statm")


class TimeLimitError(Exception):
    """The code took too long."""


def call_limited(work: Callable[[], Result], seconds: float, memory: int) -> Result:
    """Call a function, and interrupt it after a time. Allocations beyond a limit fail.

    The time is limited only in the main thread, because only this thread can be interrupted. The memory is limited only
    where /proc exists. Other threads of the process share the limit of memory.

    Args:
        work: function in Python. An operation in C is interrupted when it ends.
        seconds: limit of the time.
        memory: bytes that the process may allocate in addition to those that it has.

    Raises:
        TimeLimitError: the time is over.
        MemoryError: more memory was needed.
    """
    with _limited_memory(memory), _limited_time(seconds):
        return work()


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _interrupt)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, *timer)
        finally:
            signal.signal(signal.SIGALRM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise TimeLimitError


@contextmanager
def _limited_memory(memory: int) -> Iterator[None]:
    if not _SIZE.is_file():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(_SIZE.read_text(encoding="ascii").split()[0]) * _PAGE + memory
    if any(other != resource.RLIM_INFINITY and other < limit for other in (soft, hard)):
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
