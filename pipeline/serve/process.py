"""Run an engine as a child process. It has its own process group, and ends together with all its children."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from pipeline.config import secrets
from pipeline.errors import CheckFailed, UserError
from pipeline.runs import allocator
from pipeline.runs.console import say
from pipeline.runs.stopping import handled_by

_POLL_SECONDS = 0.25
_REPORT_SECONDS = 30.0
_GRACE_SECONDS = 15.0  # time to finish requests in flight and to free the GPU
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_TAIL_LINES = 20
_TAIL_BYTES = 1 << 14


class EngineProcess:
    """A running engine. Its output goes to a log. Leaving the `with` block ends the engine, even after an error."""

    def __init__(self, name: str, command: list[str], log: Path, environment: Mapping[str, str]) -> None:
        """Start the engine. Its environment has the variables of this program, and those in `environment`.

        Raises:
            UserError: the program cannot be started.
        """
        self._name = name
        self._log = log
        self._children: set[psutil.Process] = set()
        secrets.remember_arguments(command)
        log.touch(mode=0o600)  # engines print their arguments, which may have a key of the user
        log.chmod(0o600)
        with log.open("wb") as output:
            # The engine has its own session, so Ctrl-C reaches only this program, which then ends the engine.
            try:
                self._process = subprocess.Popen(
                    command,
                    env={**allocator.without_our_setting(os.environ), **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise UserError(f"serve.engine={name}: {command[0]} cannot be started ({error.strerror}).") from error

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until(self, is_up: Callable[[], bool], seconds: float) -> None:
        """Wait until the engine is up.

        Raises:
            CheckFailed: the engine ended, or took more than `seconds`. The message shows the end of the engine's log.
        """
        started = reported = time.monotonic()
        while not is_up():
            self._raise_if_ended("before it was up")
            self._note_children()
            now = time.monotonic()
            if now - started > seconds:
                raise self.failure(f"was not up after serve.startup_seconds={seconds:g}")
            if now - reported > _REPORT_SECONDS:
                reported = now
                say("serve", f"{self._name} is starting, {now - started:.0f} s so far: {self._last_line()}")
            time.sleep(_POLL_SECONDS)
        self._raise_if_ended("when it was up")  # another server may have answered in its place
        self._note_children()

    def wait(self) -> None:
        """Wait until the engine ends.

        Raises:
            CheckFailed: the engine ended by itself.
        """
        self._process.wait()
        self._raise_if_ended("while it served")

    def failure(self, how: str) -> CheckFailed:
        """Make the error for a fault of the engine. The message shows the end of the log."""
        tail = "".join(f"\n    {secrets.without_secrets(line)}" for line in self._tail())
        return CheckFailed(f"{self._name} {how}. The end of its log, {self._log}:{tail or ' nothing'}")

    def stop(self) -> None:
        """End the engine and all its children. Send SIGTERM first, and then SIGKILL to those that are left.

        SIGKILL follows as soon as the engine has ended. It also follows if the engine does not end in time, or if the
        user presses Ctrl-C again.
        """
        try:
            self._note_children()
            self._signal(signal.SIGTERM)
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            say("serve", f"{self._name} did not end within {_GRACE_SECONDS:g} s of SIGTERM and is killed")
        finally:
            self._signal(signal.SIGKILL)
            for child in self._children:  # children may have left the process group
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            self._process.wait()
            psutil.wait_procs(self._children, timeout=_GRACE_SECONDS)

    def _raise_if_ended(self, when: str) -> None:
        status = self._process.poll()
        if status is not None:
            how = f"exit status {status}" if status >= 0 else f"signal {-status}"
            raise self.failure(f"ended {when}, with {how}")

    def _note_children(self) -> None:
        """Remember the engine's children, because they can no longer be found once the engine has crashed."""
        with suppress(psutil.NoSuchProcess):
            self._children |= set(psutil.Process(self._process.pid).children(recursive=True))

    def _signal(self, number: signal.Signals) -> None:
        # The group's id is the engine's process id. The group may outlive the engine.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _tail(self) -> list[str]:
        with self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]

    def _last_line(self) -> str:
        return next((line.strip() for line in reversed(self._tail()) if line.strip()), "nothing in its log yet")


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt at SIGTERM and SIGHUP, as at Ctrl-C, so that these signals end the engine too.

    A signal that is ignored, such as SIGHUP under nohup, stays ignored. Only the main thread can handle signals, so
    nothing changes in another thread.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    caught = [number for number in _ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    with handled_by(interrupt, caught):
        yield
