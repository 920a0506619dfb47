"""A `python` that starts the program quickly. A server has already imported the libraries and forks for each command.

Importing torch, transformers, trl and modelopt takes five seconds, and the commands in the docs start the program some
sixty times. The program itself is not imported before the fork, so a command runs the code of its own directory, with
its own arguments, environment and exit status. Commands other than `-m pipeline` run in a new interpreter.

    python tests/warm_python.py <socket>      # the server
"""

import atexit
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path

_LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "peft", "trl", "modelopt.torch.quantization", "hydra")
_OWN = {"PWD", "OLDPWD", "SHLVL", "_", "PATH"}
"""Environment variables that may differ between the server and a command. Libraries read others while importing."""
_CLIENT = """#!{python} -SE
import json, os, socket, sys
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "pipeline"]:
    server = socket.socket(socket.AF_UNIX)
    server.connect({address!r})
    request = json.dumps([arguments[2:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    status = server.recv(1)
    if status != b"\\xff":
        sys.exit(status[0])
os.execv({python!r}, [{python!r}, *arguments])
"""


@cache
def directory() -> Path:
    """Start a server that lives as long as this process. Return the directory of its client, a script `python`."""
    made = Path(tempfile.mkdtemp(prefix="warm-python-"))
    address = str(made / "socket")
    script = made / "python"
    script.write_text(_CLIENT.format(python=sys.executable, address=address))
    script.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, __file__, address], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    atexit.register(server.kill)
    assert server.stdout is not None
    assert any(line == "ready\n" for line in server.stdout)  # libraries print other lines before
    return made


def serve(address: str) -> None:
    """Import the libraries, then run each command in a fork until this process is terminated."""
    before = dict(os.environ)
    for name in _LIBRARIES:
        __import__(name)
    import trl.trainer.sft_trainer  # noqa: F401 - trl and transformers import their parts when they are used

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _answer(connection, before)
        connection.close()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _answer(connection: socket.socket, before: dict[str, str]) -> None:
    """Run one command in a child of this process, and send the exit status of the command.

    If the command needs a new interpreter, send 255 instead.
    """
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += connection.recv(1 << 16)
    arguments, directory, environment = json.loads(request)
    different = {name for name, _ in environment.items() ^ before.items()}
    if different - _OWN:
        connection.sendall(b"\xff")
        os._exit(0)
    if (child := os.fork()) == 0:
        connection.close()
        _run(arguments, directory, environment, files)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    connection.sendall(bytes([code if code >= 0 else 128 - code]))
    os._exit(0)


def _run(arguments: list[str], directory: str, environment: dict[str, str], files: list[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(directory)
    os.environ.update(environment)
    sys.argv = ["pipeline", *arguments]
    sys.path[0] = directory
    status: object = 0
    try:
        runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = error.code
    except BaseException:  # noqa: BLE001 - an interpreter prints every other error too, and exits with status 1
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 0 if status is None else 1)


if __name__ == "__main__":
    serve(sys.argv[1])
