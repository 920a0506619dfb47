"""Deterministic training on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def deterministic_on_cpu() -> Iterator[None]:
    """Make training on a CPU deterministic. Then a resumed run ends with the same bits as an uninterrupted run.

    In deterministic mode, torch would also fill all uninitialized memory. The filling would double the time of a step
    and change no result, so it is switched off.
    """
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic  # Any: type checkers refuse assignments to this module's attributes
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(before or not torch.cuda.is_available())
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filled
