"""Start commands and groups of processes as forks of a process that has imported the libraries.

Importing torch, transformers, trl and modelopt takes eight seconds of a core. The tests start some hundred processes.
"""

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import fork_server

ROOT = Path(__file__).parents[1]


def start(path: Path, *flags: str) -> tuple["subprocess.Popen[bytes]", list[str]]:
    """Start a server at a Unix socket. Return its process, and the command that is used like an interpreter."""
    server = subprocess.Popen([sys.executable, fork_server.__file__, "--serve", path, *flags], stdin=subprocess.PIPE)
    while not path.exists():
        assert server.poll() is None, "the server ended while it imported the libraries"
        time.sleep(0.05)
    return server, [sys.executable, "-I", "-S", fork_server.__file__, "--ask", str(path)]


@cache
def interpreter() -> list[str]:
    """Return the command that is used like an interpreter. Its server ends with this process."""
    directory = Path(tempfile.mkdtemp(prefix="fork-server-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return start(directory / "socket")[1]


def run_processes(*command: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a script or module in a group of processes, as torchrun does, and return when all have ended.

    If a process fails, the others are killed, because they may wait for it.

    Returns:
        The first exit status that is not 0, and the output of all processes.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    group = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    shared = {**os.environ, **group, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        started = [
            subprocess.Popen(
                [*interpreter(), *command],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                stdout=output,
                stderr=output,
            )
            for rank in range(processes)
        ]
        status = _wait_for(started)
        output.seek(0)
        return subprocess.CompletedProcess(command, status, output.read())


def _wait_for(started: list["subprocess.Popen[bytes]"]) -> int:
    """Wait until all processes have ended or one has failed. Kill the others, and return the first status but 0."""
    deadline = time.monotonic() + 600
    try:
        while (statuses := [process.poll() for process in started]).count(0) < len(started):
            failed = [status for status in statuses if status]
            if failed or time.monotonic() > deadline:
                return failed[0] if failed else 124
            time.sleep(0.05)
        return 0
    finally:
        for process in started:
            process.kill()
            process.wait()
