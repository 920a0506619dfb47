"""Runs a function in forks of this process, because the function changes its whole process."""

import gc
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any, TypeVar

from pipeline.config.secrets import without_secrets
from pipeline.runs import stopping

Request = TypeVar("Request")
Result = TypeVar("Result")


def run(function: Callable[[Request], Result], requests: Sequence[Request], *, at_once: int) -> list[Result | str]:
    """Call a function with each request, and return the results in the order of the requests.

    If a call fails, its result is a text with the reason. The results must be picklable.

    Args:
        function: the function.
        requests: its arguments.
        at_once: largest number of forks that run at the same time.
    """
    gc.freeze()  # garbage collections in the forks skip the libraries' objects
    context, results = multiprocessing.get_context("fork"), dict[int, Result | str]()
    waiting, running = list(enumerate(requests)), dict[Any, int]()
    while waiting or running:
        while waiting and len(running) < at_once:
            number, request = waiting.pop(0)
            receive, send = context.Pipe(duplex=False)
            with stopping.postponed() as end_postponement:
                context.Process(target=_report, args=(end_postponement, send, function, request)).start()
            send.close()  # so that the end of the fork closes the pipe
            running[receive] = number
        for ready in connection.wait(list(running)):
            results[running.pop(ready)] = _receive(ready)
    return [results[number] for number in range(len(requests))]


def _report(
    end_postponement: Callable[[], None],
    send: connection.Connection,
    function: Callable[[Request], object],
    request: Request,
) -> None:
    end_postponement()
    try:
        send.send(function(request))
    except Exception as error:  # noqa: BLE001 - every error is the reason why there is no result
        print(without_secrets(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        send.send(f"{type(error).__name__}: {error}".splitlines()[0])


def _receive(ready: Any) -> Any:
    try:
        return ready.recv()
    except EOFError:
        return "the process was killed"
