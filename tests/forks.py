"""Start commands and groups of processes as forks of a process that has imported the libraries.

Importing torch, transformers, trl and modelopt takes eight seconds of a core. The tests start some hundred processes.
"""

import atexit
import fcntl
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import fork_server

ROOT = Path(__file__).parents[1]
_DIRECTORY = "FORK_SERVERS"
"""Environment variable that names the directory of the servers."""
_ENVIRONMENT = dict(os.environ)
"""The environment of servers. A test that needs a server may have changed the variables of this process."""


def share() -> None:
    """Let this process and its children use the same servers. The servers end with this process.

    Each server reads a pipe that only this process can write to.
    """
    directory = Path(tempfile.mkdtemp(prefix="fork-servers-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.mkfifo(directory / "alive")
    os.open(directory / "alive", os.O_RDWR)  # stays open until this process ends
    os.environ[_DIRECTORY] = str(directory)


def shared_directory() -> str:
    """Return the directory that the processes of the tests share. It is removed at the end."""
    return os.environ[_DIRECTORY]


def interpreter(kind: str = "cpu", preload: Path | None = None) -> list[str]:
    """Return the command that is used like an interpreter.

    Args:
        kind: "gpu" for commands that run on a pretended GPU, or "program" for a server that has imported the program.
        preload: library that the loader preloads into the server. Such a kind has one library.
    """
    directory = Path(os.environ[_DIRECTORY])
    path = directory / kind
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _start(path, *([] if kind == "cpu" else [f"--{kind}"]), preload=preload)
    return [sys.executable, "-I", "-S", fork_server.__file__, "--ask", str(path)]


@cache
def interpreter_of(checkout: Path) -> tuple[str, ...]:
    """Return a command as `interpreter` does. Its server has imported the program of a checkout, which must not change.

    The server is a fork of another server, which has imported the libraries.
    """
    path = Path(os.environ[_DIRECTORY]) / hashlib.sha256(bytes(checkout)).hexdigest()[:16]
    _start(path, "--checkout", str(checkout), preload=None, python=interpreter())
    return (sys.executable, "-I", "-S", fork_server.__file__, "--ask", str(path))


def _start(path: Path, *flags: str, preload: Path | None, python: Sequence[str] = (sys.executable,)) -> None:
    """Start a server at a Unix socket, and wait until it accepts connections."""
    with (path.parent / "alive").open("rb") as alive:
        command = [*python, fork_server.__file__, "--serve", str(path), *flags]
        preloaded = {} if preload is None else {"LD_PRELOAD": str(preload)}
        server = subprocess.Popen(command, stdin=alive, env={**_ENVIRONMENT, **preloaded})
    while not path.exists():
        assert server.poll() is None, "the server ended while it imported the libraries"
        time.sleep(0.05)


def run_processes(
    *command: str, processes: int = 2, python: Sequence[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script or module in a group of processes, as torchrun does, and return when all have ended.

    If a process fails, the others are killed, because they may wait for it.

    Args:
        command: script or `-m` and module, and arguments.
        processes: number of processes.
        python: command that is used like an interpreter, or None for `interpreter()`.

    Returns:
        The first exit status that is not 0, and the output of all processes.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    group = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    used = interpreter() if python is None else python
    shared = {**environment(), **group, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        started = [
            subprocess.Popen(
                [*used, *command],
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


def environment() -> dict[str, str]:
    """Return the environment for commands that import modules of the tests and of this checkout."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
