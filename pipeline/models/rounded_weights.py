"""Cache rounded weights until the weights change.

Weights change once per optimizer step, but every forward pass needs rounded weights. With gradient accumulation and
gradient checkpointing, a step has several forward passes. The cache holds copies in the compute type (BF16 under mixed
precision). This type represents every value of the formats exactly.
"""

import math
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config import Sharding
from pipeline.models.sharding import STRATEGIES
from pipeline.numerics.codec import CodecError

_CHECKED_AT_ONCE = frozenset({"cpu"})
"""Devices from which the host reads a result without waiting."""

_DEFAULT_ON_CPU = 1.0 * 2**30  # holds small models, and leaves gpt-oss-20b with packed experts below 20 GB


def budget_bytes(budget_gib: float | None, shared: Sharding, *, on_gpu: bool) -> float:
    """Return how many bytes of rounded weights a run may cache on each device.

    By default (`qat.rounded_cache_gib=null`), the cache must not make a run too large for the memory. So there is no
    cache on a GPU by default. The rounded experts of gpt-oss-20b would take 38 GB there, in addition to the model.
    There is also no cache by default if parameters are gathered. The cache recognizes a parameter by its address, but
    each gather is a new allocation.

    Args:
        budget_gib: value of `qat.rounded_cache_gib`.
        shared: how the model is sharded.
        on_gpu: whether the run trains on a GPU.
    """
    if budget_gib is None:
        has_none = STRATEGIES[shared].gathers or on_gpu
        return 0.0 if has_none else _DEFAULT_ON_CPU
    return budget_gib * 2**30


class NonFinite:
    """One flag for each GPU: whether a rounded value was NaN or Inf. The CPU reads the flags once per optimizer step.

    Reading a flag after each rounding would make the CPU wait for the GPU. Values on a CPU need no flag: the codec
    checks them at once, and its error names the block.
    """

    def __init__(self) -> None:
        self._flags: dict[torch.device, Tensor] = {}

    def flag(self, device: torch.device) -> Tensor | None:
        """Return the flag on this device, or None for a CPU. The codec takes it as the argument `is_bad`."""
        if device.type in _CHECKED_AT_ONCE:
            return None
        if device not in self._flags:
            self._flags[device] = torch.zeros((), dtype=torch.bool, device=device)
        return self._flags[device]

    def raise_if_any(self) -> None:
        """Check the flags. This waits for the GPU, so call it once per optimizer step, before the step.

        Raises:
            CodecError: a value was NaN or Inf.
        """
        if any(bool(flag) for flag in self._flags.values()):
            raise CodecError("NaN or Inf in the weights of experts or in their quantized inputs")


class PackedWeights(NamedTuple):
    """Rounded weights, packed in the format that they were rounded to. Decoding gives the same values."""

    blocks: Tensor
    scales: Tensor
    tensor_scale: Tensor | None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(part.nbytes for part in self if part is not None)


class RoundedWeights:
    """A cache of rounded weights. Call `forget` whenever weights may have changed.

    Attributes:
        non_finite: flags that are set if training rounds NaN or Inf. Check them once per optimizer step.
    """

    def __init__(self, budget_bytes: float = math.inf) -> None:
        """Create a cache of at most `budget_bytes`. Weights that do not fit are rounded in every forward pass."""
        self.non_finite = NonFinite()
        self._budget = budget_bytes
        self._kept: dict[Hashable, tuple[tuple[int, ...], Tensor]] = {}
        self._packed: dict[Hashable, PackedWeights] = {}

    @property
    def bytes(self) -> int:
        """Size of the cached weights in bytes."""
        return sum(rounded.nbytes for _, rounded in self._kept.values()) + sum(e.nbytes for e in self._packed.values())

    def of(self, key: Hashable, weight: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Return the cached values of `key`, or call `make` and cache its result if there is room.

        The cache notices when a parameter changes. It cannot notice this for a weight that is computed from parameters,
        such as base + delta, so call `forget` after each change.
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

    def packed(self, key: Hashable, size: int, make: Callable[[], PackedWeights]) -> PackedWeights | None:
        """Return the cached packed weights of `key`, or call `make` and cache its result.

        Return None, without calling `make`, if there is no room for `size` bytes.
        """
        if key not in self._packed:
            if self.bytes + size > self._budget:
                return None
            self._packed[key] = make()
        return self._packed[key]

    def forget(self) -> None:
        """Empty the cache."""
        self._kept.clear()
        self._packed.clear()


def _version(weight: Tensor) -> tuple[int, ...]:
    return (weight.data_ptr(), weight._version) if weight.is_leaf and weight.requires_grad else ()
