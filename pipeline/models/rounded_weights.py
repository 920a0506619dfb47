"""A cache of rounded weights, valid until the weights change.

Weights change once per optimizer step. Every forward pass rounds them, and with accumulation and gradient checkpointing
there are several per step. The cache holds copies in the type of the arithmetic (BF16 under mixed precision), which
represents every value of the formats exactly.
"""

import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from pipeline.config import Sharding
from pipeline.models.sharding import STRATEGIES


def budget_bytes(budget_gib: float | None, shared: Sharding) -> float:
    """Return how many bytes of rounded weights a run may cache on each device.

    Without a budget (`qat.rounded_cache_gib=null`) there is no limit. Where parameters are gathered the cache is off,
    because each gathering allocates the parameter anew.
    """
    if budget_gib is None:
        return 0.0 if STRATEGIES[shared].gathers else math.inf
    return budget_gib * 2**30


class RoundedWeights:
    """The cache. Call `forget` whenever weights may have changed."""

    def __init__(self, budget_bytes: float = math.inf) -> None:
        """Cache at most `budget_bytes`. Weights beyond it are rounded in every forward pass."""
        self._budget = budget_bytes
        self._kept: dict[Hashable, tuple[tuple[int, ...], Tensor]] = {}

    @property
    def bytes(self) -> int:
        """Bytes in the cache."""
        return sum(rounded.nbytes for _, rounded in self._kept.values())

    def of(self, key: Hashable, weight: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Return the cached values of `key`, or call `make` and cache its result if there is room.

        A parameter that was written to since is noticed. A weight computed from parameters is not, hence `forget`.
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
        """Empty the cache."""
        self._kept.clear()


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the type in which a matrix product with `weight` is computed here."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _version(weight: Tensor) -> tuple[int, ...]:
    return (weight.data_ptr(), weight._version) if weight.is_leaf and weight.requires_grad else ()
