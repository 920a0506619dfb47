"""Runs Python commands without the time that imports take: a server has imported the libraries, and forks.

    python tests/fork_server.py --serve SOCKET [KIND]        the server; it ends when its standard input closes
    python -I -S tests/fork_server.py --ask SOCKET COMMAND   the client; COMMAND starts with a script or `-m MODULE`

KIND is --gpu, --program or --checkout DIRECTORY. With --gpu, commands run on a pretended GPU. With --program, the
server also imports the program of this checkout. With --checkout, it imports the program of that directory, and such
a server may be a command of another server. The client is used like an interpreter: the command has the arguments,
environment, directory and streams of the client, and gets the signals that the client gets. The client has its exit
status. If the client is killed, the command is killed too. Tests start servers and clients with tests/forks.py.

Without a kind, the program is imported after the fork, so a command runs the code of its own directory. Libraries read
some environment variables while they are imported. If one of these differs between client and server, the client runs
the command in a new interpreter.

Commands do not wait for the disk (see `skip_syncs`) and share large tables (see shared_tables.py), except with
--program, because tests/faults cuts the power and disturbs each call that writes.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

_LIBRARIES = (
    *("torch", "transformers", "datasets", "accelerate", "peft", "trl.trainer.sft_trainer", "hydra"),
    *("modelopt.torch.quantization", "torch.distributed.tensor", "matplotlib.figure", "scipy.stats"),
)
_OF_THE_PROGRAM = ("pipeline.__main__", "pipeline.models.fake_quantizers", "pipeline.training.trainer")
"""Modules that a server with --gpu or --program imports too. It serves only this checkout."""
_READ_AT_IMPORT = (
    *("CUDA_VISIBLE_DEVICES", "HF_DATASETS_", "HF_ENDPOINT", "HF_HOME", "HF_HUB_", "OMP_NUM_THREADS", "TRANSFORMERS_"),
    "TRITON_INTERPRET",
)
"""How names of such variables begin. Libraries set others in the tests' process, such as HF_XET_HIGH_PERFORMANCE."""
_NEW_INTERPRETER = b"\xff"
_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
"""Signals that a client passes on to its command."""


def skip_syncs(patch: Any) -> None:
    """Let os.fsync return at once. `patch` sets an attribute, as `setattr` does.

    A sync takes some milliseconds, and a run of all stages has 300. Only a power cut can show that one was left out.
    """
    patch(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)  # an error if the file is not open


# --- client -----------------------------------------------------------------------------------------------------------


def ask(path: str, command: list[str]) -> int:
    """Let the server at a Unix socket run a command, and return the exit status."""
    ignored = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    order = {"command": command, "environment": dict(os.environ), "directory": os.getcwd(), "ignored": ignored}
    text = json.dumps(order).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [len(text).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(text)
        for number in {*_SIGNALS}.difference(ignored):
            signal.signal(number, lambda number, _: server.sendall(bytes([number])))
        answer = server.recv(1)
    if answer == _NEW_INTERPRETER:
        print("fork_server: slow, because a variable that libraries read at import differs", file=sys.stderr)
        os.execv(sys.executable, [sys.executable, *command])
    return answer[0] if answer else 1


# --- server -----------------------------------------------------------------------------------------------------------


def serve(path: str, libraries: tuple[str, ...], *, may_refuse: bool) -> None:
    """Import the libraries, then fork for each client at a Unix socket, until standard input is closed."""
    import gc
    import importlib
    import select

    before = _read_at_import(os.environ) if may_refuse else None
    for name in libraries:
        importlib.import_module(name)
    gc.freeze()  # or each garbage collection of a fork would visit the objects of the libraries
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.new")
        server.listen()
        os.rename(f"{path}.new", path)  # when clients see the socket, it accepts connections
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _answer(client, before)
            client.close()
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _read_at_import(environment: Any) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_AT_IMPORT)}


def _answer(client: socket.socket, before: dict[str, str] | None) -> NoReturn:
    """Run the client's command in a child of this process, and send the exit status."""
    import threading

    size, files, _, _ = socket.recv_fds(client, 8, 3)
    text = b""
    while missing := int.from_bytes(size, "big") - len(text):
        text += client.recv(missing)
    order = json.loads(text)
    if before is not None and before != _read_at_import(order["environment"]):
        client.sendall(_NEW_INTERPRETER)
        os._exit(0)
    if (child := os.fork()) == 0:
        client.close()
        _run(order, files)
    threading.Thread(target=_pass_signals, args=(client, child), daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(OSError):
        client.sendall(bytes([code if code >= 0 else 128 - code]))
    os._exit(0)


def _pass_signals(client: socket.socket, child: int) -> None:
    """Pass each signal that the client gets on to the child. When the client has gone, kill the child."""
    with suppress(OSError):
        while number := client.recv(1):
            os.kill(child, number[0])
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def _run(order: dict[str, Any], files: list[int]) -> NoReturn:
    """Run a script or module in this process, as a new interpreter would. End the process with its exit status."""
    import runpy
    import traceback

    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # The old stream objects remember properties of the old files, such as whether they are seekable.
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    for number in _SIGNALS:
        handler = signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in order["ignored"] else handler)
    os.chdir(order["directory"])
    interprets = {"TRITON_INTERPRET": os.environ["TRITON_INTERPRET"]} if "TRITON_INTERPRET" in os.environ else {}
    os.environ.clear()
    os.environ.update(order["environment"] | interprets)
    is_module = order["command"][0] == "-m"
    sys.argv = order["command"][is_module:]
    first = order["directory"] if is_module else os.path.dirname(os.path.abspath(sys.argv[0]))
    sys.path[:1] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    status: object = 0
    try:
        if is_module:
            with _composed_quickly(*sys.argv):
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - an interpreter prints every other error too, and exits with status 1
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


@contextmanager
def _composed_quickly(module: str, *arguments: str) -> Iterator[None]:
    """Let the program compose its configuration as in `conftest.run_program`."""
    if module != "pipeline":
        yield
        return
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from composing import composed_once

    sys.path.pop()
    with composed_once(arguments):
        yield


def _spare(path: str) -> None:
    """Spare commands the waits for the disk, and the making of large tables."""
    from shared_tables import share_tables

    skip_syncs(setattr)
    share_tables(setattr, os.path.dirname(path))


def _compose_once() -> None:
    """Compose a configuration of this checkout, so that commands find the parts that Hydra composes quickly."""
    from composing import composed_quickly

    from pipeline.config import composition

    with composed_quickly():
        for recipe in ("smoke", "smoke_lora"):
            composition.compose(["stage=sft", f"recipe={recipe}"])


def _serve_on_gpu(path: str) -> None:
    sys.path.insert(1, os.path.dirname(sys.path[0]))  # the program, for `pretended_gpu`
    os.environ["TRITON_INTERPRET"] = "1"  # TRL's kernels then run on the CPU; Triton reads the variable at import
    import torch
    from pretended_gpu import gpu

    _spare(path)
    torch.set_num_threads(1)
    _compose_once()
    with gpu():
        # A new interpreter has no pretended GPU, so this server runs every command.
        serve(path, (*_LIBRARIES, *_OF_THE_PROGRAM), may_refuse=False)


def main() -> None:
    """Do what the command line asks for."""
    what, path, *more = sys.argv[1:]
    if what == "--ask":
        sys.exit(ask(path, more))
    if more == ["--gpu"]:
        _serve_on_gpu(path)
    elif more == ["--program"]:
        sys.path.insert(1, os.path.dirname(sys.path[0]))
        _compose_once()
        serve(path, (*_LIBRARIES, *_OF_THE_PROGRAM), may_refuse=True)
    elif more[:1] == ["--checkout"]:
        sys.path.insert(1, more[1])
        _spare(path)
        _compose_once()
        serve(path, (*_LIBRARIES, *_OF_THE_PROGRAM), may_refuse=True)
    else:
        _spare(path)
        serve(path, _LIBRARIES, may_refuse=True)


if __name__ == "__main__":
    main()
