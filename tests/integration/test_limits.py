"""Code of others is stopped when its CPU time or its memory is used up, wherever it is."""

import fcntl
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.runs.limits import CodeError, LimitedFunction, TimeLimitError

MIB = 1 << 20


def spin() -> None:
    while True:
        pass


def run_work(work: Callable[[], object]) -> list[str]:
    return [str(work())]


class Sleeps:
    """Work without CPU time."""

    def __call__(self) -> str:
        time.sleep(0.3)
        return "awake"


class Kills:
    """Work that ends its process."""

    def __call__(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Power:
    """An operation in C that takes longer than anyone waits."""

    def __call__(self) -> int:
        return 10 ** (10**9)


class Allocates:
    """Work that needs 256 MiB."""

    def __call__(self) -> bytes:
        return bytes(256 * MIB)


class Complains:
    def __call__(self) -> None:
        raise ZeroDivisionError("never\ndo this")


@pytest.fixture
def limited() -> Iterator[LimitedFunction[Callable[[], object]]]:
    made = LimitedFunction(run_work, 128 * MIB)
    yield made
    made.close()


@pytest.mark.parametrize("work", [spin, Power()], ids=["Python", "C"])
def test_endless_code_is_stopped_and_the_next_call_works(limited, work) -> None:
    with pytest.raises(TimeLimitError):
        limited(work, 0.1)
    assert limited(os.getpid, 1).texts != [str(os.getpid())]


def test_time_in_which_the_code_does_not_run_is_not_counted(limited) -> None:
    texts, seconds = limited(Sleeps(), 0.1)
    assert (texts, seconds < 0.1) == (["awake"], True)


def test_without_time_left_the_code_is_not_called(limited) -> None:
    with pytest.raises(TimeLimitError):
        limited(Sleeps(), 0.0)


def test_memory_is_limited_in_the_fork_alone(limited) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError):
        limited(Allocates(), 10)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert limited(os.getpid, 1).texts != [str(os.getpid())]


@pytest.mark.parametrize(("work", "message"), [(Complains(), "never"), (Kills(), "its process ended with SIGKILL")])
def test_another_end_of_the_code_is_described(limited, work, message: str) -> None:
    with pytest.raises(CodeError, match=f"^{message}$"):
        limited(work, 1)
    assert limited(os.getpid, 1).texts != [str(os.getpid())]


def test_calls_of_other_threads_are_limited_too(limited) -> None:
    results: list[object] = []

    def call() -> None:
        try:
            limited(Power(), 0.1)
        except TimeLimitError as error:
            results.append(type(error))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [TimeLimitError] * 2


def test_an_interrupted_call_leaves_no_answer_for_the_next(limited) -> None:
    limited(str, 1)  # Make the fork before the alarm, which `postponed` does not postpone.
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            limited(Sleeps(), 1)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert limited(str, 1).texts == [""]


def test_an_interruption_while_the_fork_is_made_comes_afterwards(limited, monkeypatch: pytest.MonkeyPatch) -> None:
    made, fork = [], os.fork

    def interrupted_fork() -> int:
        signal.raise_signal(signal.SIGINT)
        made.append(fork())
        return made[-1]

    monkeypatch.setattr(os, "fork", interrupted_fork)
    with pytest.raises(KeyboardInterrupt):
        limited(str, 1)
    monkeypatch.undo()
    with pytest.raises(ProcessLookupError):
        os.kill(made[0], 0)
    assert limited(str, 1).texts == [""]


def test_all_calls_share_one_fork_which_close_ends(limited) -> None:
    (fork,) = {limited(os.getpid, 1).texts[0] for _ in range(3)}
    limited.close()
    assert not os.path.exists(f"/proc/{fork}")


def test_the_fork_holds_no_lock_that_this_process_has_released(limited, tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        limited(str, 1)
    with (tmp_path / "lock").open("w") as again:
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_fork_of_this_process_makes_its_own(limited) -> None:
    ours = limited(os.getpid, 1).texts
    number = os.fork()
    if number == 0:
        os._exit(0 if limited(os.getpid, 1).texts != ours else 1)
    assert os.waitpid(number, 0) == (number, 0)
    assert limited(os.getpid, 1).texts == ours


def test_the_fork_ends_with_the_process_that_made_it() -> None:
    receive, send = os.pipe()
    number = os.fork()
    if number == 0:
        os.write(send, LimitedFunction(run_work, MIB)(os.getpid, 1).texts[0].encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(number, 0)
    fork = int(os.read(receive, 100))
    end = time.monotonic() + 10
    while time.monotonic() < end and _runs(fork):
        time.sleep(0.01)
    assert not _runs(fork)
    os.close(receive)
    os.close(send)


def _runs(number: int) -> bool:
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False
