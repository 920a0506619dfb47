"""Rounded weights kept for as long as the weights do not change.

Weights change once per optimizer step, but every forward pass rounds them: with accumulation and gradient checkpointing
several times per step. What is kept is a copy in the type of the arithmetic, BF16 under mixed precision, which holds
every value of the formats exactly.
"""

import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from pipeline.config import Sharding
from pipeline.models.sharding import STRATEGIES


def budget_bytes(budget_gib: float | None, shared: Sharding) -> float:
    """How many bytes of rounded weights a run may keep on each device.

    Without a budget (`qat.rounded_cache_gib=null`) all are kept. Where parameters are gathered none is kept, because
    each gathering allocates the parameter anew.
    """
    if budget_gib is None:
        return 0.0 if STRATEGIES[shared].gathers else math.inf
    return budget_gib * 2**30


class RoundedWeights:
    """A store of rounded weights, emptied by `forget` whenever weights may have changed."""

    def __init__(self, budget_bytes: float = math.inf) -> None:
        """Keep at most so many bytes; what does not fit is rounded in every forward pass."""
        self._budget = budget_bytes
        self._kept: dict[Hashable, tuple[tuple[int, ...], Tensor]] = {}

    @property
    def bytes(self) -> int:
        """Size of what is kept."""
        return sum(rounded.nbytes for _, rounded in self._kept.values())

    def of(self, key: Hashable, weight: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """The kept values of `key`, or what `make` gives, which is kept if there is room.

        A parameter that was written to since is noticed; what is computed from parameters is not: hence `forget`.
        """
        version = _version(weight)
        kept = self._kept.get(key)
        if kept is not None and kept[0] == version:
            return kept[1]
        self._kept.pop(key, None)
        rounded = make()
        if self.bytes + rounded.nbytes <= self._budget:
            self._kept[key] = (version, rounded)
        return rounded

    def forget(self) -> None:
        """Weights may have changed."""
        self._kept.clear()


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The type in which a matrix product with `weight` is computed here."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _version(weight: Tensor) -> tuple[int, ...]:
    return (weight.data_ptr(), weight._version) if weight.is_leaf and weight.requires_grad else ()
