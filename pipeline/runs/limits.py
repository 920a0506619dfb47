"""Runs code that others wrote, such as a chat template, with a limit of time and of memory.

The code runs in a fork of this process. Only a process can be stopped in the middle of an operation in C, such as
10**(10**9). The system stops the fork when it has used its CPU time, so a busy or suspended machine does not matter.
"""

import gc
import json
import os
import resource
import signal
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from pipeline.runs import stopping

Request = TypeVar("Request")
_PAGE = resource.getpagesize()
_SIZE = Path("/proc/self/statm")
_HEADER = struct.Struct("<cd")  # kind of the answer, CPU seconds
_TEXTS, _NO_MEMORY, _ERROR = b"t", b"m", b"e"
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_FIRST_FILE = 3  # after standard input, output and error
_SECONDS_BETWEEN_LOOKS = 60.0  # after which a fork without work looks whether its parent still lives


class TimeLimitError(Exception):
    """The code took too long."""


class CodeError(Exception):
    """The code raised an error, or ended its process.

    Attributes:
        name: name of the error's class. It is empty if the process ended.
    """

    def __init__(self, message: str, name: str = "") -> None:
        """Create the error from the first line of the code's error, and the name of its class."""
        super().__init__(message)
        self.name = name


class Answer(NamedTuple):
    """The texts that the code returned, and how many seconds of CPU time it took."""

    texts: list[str]
    seconds: float


class LimitedFunction(Generic[Request]):
    """A function of others' code, which runs in a fork of this process. All its calls share one fork.

    The fork ends with this process, or with `close`. It has the values that existed at the first call.
    """

    def __init__(self, function: Callable[[Request], list[str]], memory: int) -> None:
        """Keep the arguments. The first call makes the fork.

        Args:
            function: function of a picklable request.
            memory: bytes that the fork may allocate in addition to those that this process has. The memory is limited
                only where /proc exists.
        """
        self._function = function
        self._memory = memory
        self._lock = threading.Lock()
        self._fork: tuple[int, connection.Connection] | None = None
        self._owner = 0

    def __call__(self, request: Request, seconds: float) -> Answer:
        """Call the function.

        Raises:
            TimeLimitError: it used more than `seconds` of CPU time.
            MemoryError: it needs more memory.
            CodeError: it raised another error, or a signal ended its process.
        """
        if seconds <= 0:
            raise TimeLimitError
        with self._lock:
            try:
                answer = self._ask(request, seconds)
            except BaseException:
                self.close()  # the answer may still come, and must not be taken for the next one's
                raise
        kind, used = _HEADER.unpack_from(answer)
        if kind == _NO_MEMORY:
            raise MemoryError
        texts = json.loads(answer[_HEADER.size :])
        if kind == _ERROR:
            raise CodeError(*texts)
        return Answer(texts, used)

    def close(self) -> None:
        """End the fork. A later call makes another."""
        if self._fork is None:
            return
        (number, pipe), self._fork = self._fork, None
        pipe.close()
        if self._owner == os.getpid():
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)

    def __del__(self) -> None:
        with suppress(OSError):  # the fork has ended
            self.close()

    def _ask(self, request: Request, seconds: float) -> bytes:
        if self._fork is None or self._owner != os.getpid():  # a fork of this process must not share its pipe
            with stopping.postponed():
                self._fork, self._owner = self._start(), os.getpid()
        number, pipe = self._fork
        try:
            pipe.send((request, seconds))
            return pipe.recv_bytes()
        except (EOFError, ConnectionError):
            self._fork = None
            pipe.close()
            _, status = os.waitpid(number, 0)
        ended_by = os.waitstatus_to_exitcode(status)
        if ended_by == -signal.SIGPROF:
            raise TimeLimitError
        raise CodeError(f"its process ended with {signal.Signals(-ended_by).name if ended_by < 0 else ended_by}")

    def _start(self) -> tuple[int, connection.Connection]:
        ours, theirs = Pipe()
        parent = os.getpid()
        number = os.fork()
        if number == 0:
            try:
                _close_files_except(theirs.fileno())
                _serve(self._function, theirs, self._memory, parent)
            finally:
                os._exit(1)
        theirs.close()
        return number, ours


def _serve(function: Callable[[Request], list[str]], pipe: connection.Connection, memory: int, parent: int) -> None:
    """Answer requests until the parent ends, or the system ends this process with SIGPROF."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    gc.freeze()  # garbage collections skip the parent's objects, so their memory stays shared
    _limit_memory(memory)
    while True:
        while not pipe.poll(_SECONDS_BETWEEN_LOOKS):
            if os.getppid() != parent:
                return
        try:
            request, seconds = pipe.recv()
        except EOFError:
            return
        pipe.send_bytes(_answer(function, request, seconds))


def _close_files_except(kept: int) -> None:
    """Close the files of the parent. An open one would keep the parent's locks after the parent has closed it."""
    os.closerange(_FIRST_FILE, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))


def _answer(function: Callable[[Request], list[str]], request: Request, seconds: float) -> bytes:
    kind, begin = _TEXTS, time.process_time()
    signal.setitimer(signal.ITIMER_PROF, max(seconds, 1e-3))
    try:
        content = json.dumps(function(request)).encode()
    except MemoryError:
        kind, content = _NO_MEMORY, b""
    except Exception as error:  # noqa: BLE001 - the code is a program that others wrote, so it can raise any error
        kind, content = _ERROR, json.dumps([_first_line(error), type(error).__name__]).encode()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return _HEADER.pack(kind, time.process_time() - begin) + content


def _first_line(error: Exception) -> str:
    return f"{(str(error).strip() or type(error).__name__).splitlines()[0]:.300}"


def _limit_memory(memory: int) -> None:
    if not _SIZE.is_file():
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(_SIZE.read_text(encoding="ascii").split()[0]) * _PAGE + memory
    if all(other == resource.RLIM_INFINITY or other >= limit for other in (soft, hard)):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
