"""Run a command as its own process, and measure its time and memory."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss: bytes on macOS, KiB on Linux


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        status: exit status. A process that a signal has ended has the signal's negative number.
        seconds: duration from its start to its end, with start-up and imports.
        cpu_seconds: CPU time of all its threads, and of the processes that it started.
        peak_bytes: largest resident memory of the process. It includes pages of files that the process has mapped, but
            not the page cache. The processes that it started are not added; the largest process counts.
    """

    status: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run(command: tuple[str, ...], root: Path, log: Path) -> Ended:
    """Run Python with these arguments. What it prints is appended to `log`.

    A process begins with the peak of the process that started it. So this module must run in a small process.
    """
    environment = {**os.environ, "PYTHONPATH": str(root)}
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=root, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - start
    return Ended(process.returncode, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * _RSS_UNIT)
