"""Code of others is interrupted when its time or its memory is used up."""

import resource
import signal
import threading
import time

import pytest

from pipeline.runs.limits import TimeLimitError, call_limited

GIB = 1 << 30


def spin() -> None:
    while True:
        pass


def test_endless_code_is_interrupted() -> None:
    begin = time.monotonic()
    with pytest.raises(TimeLimitError):
        call_limited(spin, 0.1, GIB)
    assert time.monotonic() - begin < 5
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_memory_is_limited_and_the_limit_is_lifted_afterwards() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError):
        call_limited(lambda: bytes(2 * GIB), 10, GIB)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(call_limited(lambda: bytes(1000), 10, GIB)) == 1000


def test_another_thread_has_no_limit_of_time() -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(call_limited(lambda: 1, 10, GIB)))
    thread.start()
    thread.join()
    assert results == [1]
