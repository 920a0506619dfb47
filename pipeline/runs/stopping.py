"""Stop in order when the system asks for it.

Batch systems and cloud providers announce the end of a job with SIGTERM, SIGHUP or SIGUSR1. By default, these signals
end a program at once. With `heed_signals`, they raise `Stopped`, and the stage leaves files that it can resume.
Inside `deferred`, the program calls `find_request`, and stops at a place of its choice.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from pipeline.runs.console import say

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
EXIT_STATUS = 143
"""128 + SIGTERM, as a shell reports it. It is the same for all of these signals."""

Handler = Callable[[int, FrameType | None], object]
"""A function that Python calls with the number of a signal and the interrupted frame."""

_deferring: tuple[str, str] | None = None
_asked: signal.Signals | None = None


class Stopped(BaseException):
    """The system asked the program to stop. Like KeyboardInterrupt, it is not an error, so nothing handles it."""

    def __init__(self, number: signal.Signals, after: str = "") -> None:
        """Create the exception. `after` says where the program stopped."""
        super().__init__(f"stopped by {number.name}{after}")


def heed_signals() -> None:
    """Let the signals stop this program in order. A signal that is ignored, as SIGHUP under nohup, stays ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)


@contextmanager
def deferred(stage: str, until: str) -> Iterator[None]:
    """Inside the block, the first signal is only stored for `find_request`. A second signal stops the program at once.

    Args:
        stage: name of the stage, for the message.
        until: the time at which the program will stop, for the message.
    """
    global _deferring, _asked
    _deferring, _asked = (stage, until), None
    try:
        yield
    except BaseException:
        _asked = None
        raise
    finally:
        _deferring = None


@contextmanager
def handled_by(handler: Handler, numbers: Iterable[signal.Signals]) -> Iterator[Callable[[], None]]:
    """Let a function handle these signals inside the block. The block yields a function that ends this earlier.

    Only the main thread can handle signals, so nothing changes in another thread.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers} if is_main else {}

    def end() -> None:
        for number, earlier in before.items():
            signal.signal(number, earlier)

    try:
        yield end
    finally:
        end()


@contextmanager
def postponed() -> Iterator[Callable[[], None]]:
    """Let signals and Ctrl-C take effect after the block, which should be short.

    An exception inside os.fork would leave locks held that libraries, such as `logging`, take there. The block yields
    a function that ends the postponement early, for a fork that never leaves the block.
    """
    arrived: list[tuple[int, FrameType | None]] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *SIGNALS)}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}
    with handled_by(lambda *signaled: arrived.append(signaled), before) as end:
        yield end
    for number, frame in arrived:
        before[signal.Signals(number)](number, frame)


def raise_if_asked(after: str) -> None:
    """Raise `Stopped` if a signal arrived inside `deferred`, and the program did not stop there.

    `after` says what the program has completed.
    """
    global _asked
    number, _asked = _asked, None
    if number is not None:
        raise Stopped(number, after)


def find_request() -> signal.Signals | None:
    """Return the signal that arrived inside `deferred`, or None. It is kept until the program stops."""
    return _asked


def _receive(number: int, frame: FrameType | None) -> None:
    global _asked
    if _deferring is None or _asked is not None:
        raise Stopped(signal.Signals(number))
    _asked = signal.Signals(number)
    stage, until = _deferring
    with suppress(RuntimeError):  # the signal has interrupted another print to the same stream
        say(stage, f"{_asked.name}: stopping {until}")
