"""Run Python on a pretended GPU.

    python tests/on_pretended_gpu.py SCRIPT arguments…            like `python SCRIPT arguments…`
    python tests/on_pretended_gpu.py -m MODULE arguments…         like `python -m MODULE arguments…`
    python tests/on_pretended_gpu.py --serve SOCKET               serve the next command, until standard input closes
    python -I -S tests/on_pretended_gpu.py --ask SOCKET SCRIPT …  let the server run a script or a module

The server forks for each client, so that many short scripts share the time of its imports. A fork has the arguments,
environment, directory and output of the client. The client ends with the exit status of the fork.
"""

import json
import os
import socket
import sys


def run(arguments: list[str]) -> None:
    """Run a script or a module in this process, inside `pretended_gpu.gpu`."""
    import runpy

    is_module = arguments[0] == "-m"
    sys.argv = arguments[is_module:]
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def ask(path: str, arguments: list[str]) -> int:
    """Let the server at a Unix socket run a script or a module, and return the exit status."""
    order = {"arguments": arguments, "environment": dict(os.environ), "directory": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [b"+"], [1, 2])
        server.sendall(json.dumps(order).encode())
        server.shutdown(socket.SHUT_WR)
        answer = server.recv(1)
    return answer[0] if answer else 1  # a fork that is killed sends nothing


def serve(path: str) -> None:
    """Fork for each client at a Unix socket, until standard input is closed."""
    import gc
    import select

    import modelopt.torch.quantization  # noqa: F401  like the following imports, for all forks

    from pipeline import __main__ as program  # noqa: F401
    from pipeline.models import fake_quantizers  # noqa: F401
    from pipeline.training import trainer  # noqa: F401

    gc.freeze()  # or each garbage collection of a fork would visit the objects of the libraries
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _serve_one(client)
            client.close()
            _reap()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _serve_one(client: socket.socket) -> None:
    """Run the client's script or module in this fork. Then send the exit status, and end the process."""
    _, outputs, _, _ = socket.recv_fds(client, 1, 2)
    order = json.loads(b"".join(iter(lambda: client.recv(1 << 16), b"")))
    for number, output in zip((1, 2), outputs, strict=True):
        os.dup2(output, number)
    os.environ.clear()
    os.environ.update(order["environment"], TRITON_INTERPRET="1")
    os.chdir(order["directory"])
    status = _status_of(order["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    client.sendall(bytes([status]))
    os._exit(status)


def _status_of(arguments: list[str]) -> int:
    """Run a script or a module, and return the exit status that Python would have."""
    import traceback

    try:
        run(arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:  # noqa: BLE001  like Python at the end of a script
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Do what the command line asks for."""
    if sys.argv[1] == "--ask":
        sys.exit(ask(sys.argv[2], sys.argv[3:]))
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:0] = [here, os.path.dirname(here)]
    os.environ["TRITON_INTERPRET"] = "1"  # TRL's kernels then run on the CPU; Triton reads the variable at import

    import torch
    from pretended_gpu import gpu

    torch.set_num_threads(1)
    with gpu():
        if sys.argv[1] == "--serve":
            serve(sys.argv[2])
        else:
            run(sys.argv[1:])


if __name__ == "__main__":
    main()
