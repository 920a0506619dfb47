"""Forks return results in order, and a fork that fails or dies costs only its own result."""

import os
import signal

from pipeline.doctor import forks


def work(number: int) -> tuple[int, int]:
    if number == 1:
        raise ValueError("one is\nbad")
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number, os.getpid()


def test_results_come_in_order_and_failures_are_texts() -> None:
    first, failed, killed, *others = forks.run(work, range(6), at_once=2)
    assert failed == "ValueError: one is"
    assert killed == "the process was killed"
    results = [first, *others]
    assert [each[0] for each in results] == [0, 3, 4, 5]
    assert len({os.getpid(), *(each[1] for each in results)}) == 5, "each call has a process of its own"


def test_without_requests_there_are_no_results() -> None:
    assert forks.run(work, [], at_once=2) == []


def test_forks_have_the_handlers_of_this_process() -> None:
    assert forks.run(lambda _: signal.getsignal(signal.SIGINT) is signal.default_int_handler, [0], at_once=1) == [True]
