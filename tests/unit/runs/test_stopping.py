"""Signals that announce the end of a job stop the program in order."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from pipeline import __main__ as program
from pipeline.runs import stopping
from pipeline.runs.stopping import Stopped


@pytest.fixture(autouse=True)
def heeded_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    stopping.heed_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", stopping.SIGNALS, ids=str)
def test_a_signal_ends_the_program_with_143_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    monkeypatch.setattr(program, "run", lambda _: send(number))
    monkeypatch.setattr("sys.argv", ["pipeline", "stage=doctor", "recipe=smoke"])
    assert program.status(["stage=doctor", "recipe=smoke"]) == 143
    assert capsys.readouterr().err == (
        f"error: stopped by {number.name}. To go on: the same command, without overwrite=true\n"
    )


def test_a_deferred_signal_waits_until_the_program_asks(capsys: pytest.CaptureFixture[str]) -> None:
    with stopping.deferred("sft", "after this step"):
        assert stopping.find_request() is None
        send(signal.SIGHUP)
        assert stopping.find_request() is signal.SIGHUP
    assert capsys.readouterr().out == "[sft] SIGHUP: stopping after this step\n"
    with pytest.raises(Stopped, match=r"stopped by SIGHUP after stage=sft$"):
        stopping.raise_if_asked(" after stage=sft")
    stopping.raise_if_asked(" after stage=qat")  # the signal has been heeded
    with pytest.raises(Stopped):
        send(signal.SIGHUP)


def test_a_postponed_signal_takes_effect_after_the_block() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, *stopping.SIGNALS)]
    done = []
    with pytest.raises(KeyboardInterrupt), stopping.postponed():
        send(signal.SIGINT)
        done.append("all")
    with pytest.raises(Stopped, match="stopped by SIGTERM"), stopping.postponed() as end:
        send(signal.SIGHUP)
        end()
        send(signal.SIGTERM)
    assert done == ["all"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, *stopping.SIGNALS)] == before


def test_an_error_inside_a_postponement_is_not_replaced_by_a_signal() -> None:
    with pytest.raises(ZeroDivisionError), stopping.postponed():
        send(signal.SIGINT)
        raise ZeroDivisionError


def test_other_threads_and_ignored_signals_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handlers = []

    def look() -> None:
        with stopping.postponed():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
    with stopping.postponed():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_second_signal_does_not_wait() -> None:
    with pytest.raises(Stopped, match="stopped by SIGTERM"), stopping.deferred("sft", "after this step"):
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
    assert stopping.find_request() is None


def test_a_signal_in_the_middle_of_a_print_is_stored_without_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    monkeypatch.setattr(stopping, "say", refuse)
    with pytest.raises(Stopped), stopping.deferred("sft", "after this step"):
        send(signal.SIGTERM)
        assert stopping.find_request() is signal.SIGTERM
        raise Stopped(signal.SIGTERM)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stopping.heed_signals()
    send(signal.SIGHUP)
