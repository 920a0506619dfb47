"""Spares the first of the two times that Hydra composes a configuration. The tests run a thousand command lines."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from hydra._internal.hydra import Hydra


@contextmanager
def composed_once(arguments: Sequence[str]) -> Iterator[None]:
    """Let the program that runs with these arguments compose its configuration once.

    Hydra 1.3 first composes a configuration only to read hydra.mode, which is null by default, and ignores all errors.
    That takes a tenth of a second. It is skipped if no argument sets a key of Hydra.
    """
    if any("hydra." in argument for argument in arguments):
        yield
        return
    with patch.object(Hydra, "get_mode", lambda *_, **__: None):
        yield
