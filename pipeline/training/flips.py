"""Find values that flip back and forth, with a running mean.

A value that moves steadily stays ahead of its mean. A value that flips crosses its mean each time.

Legend: E = experts, in, out = sizes of a projection.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BYTES_PER_WEIGHT = 3
"""Memory of `Flips` for each weight: a BF16 mean, and a count of one byte."""

_MEMORY = 1 / 8  # weight of the newest rounded value in the running mean
_MOST = 126  # an int8 holds one crossing more
_VALUES_AT_ONCE = 1 << 22  # limits the size of temporary tensors, if an expert is not larger


class Flips(NamedTuple):
    """Running mean of rounded values, and the number of times that a rounded value crossed it.

    Attributes:
        mean: running mean of the rounded values, (E, in, out) bfloat16.
        crossings: (E, in, out) int8. The sign is the side of the mean on which the last value was. The magnitude is one
            more than the number of crossings. It is 0 until a value differs from the mean.
    """

    mean: Tensor
    crossings: Tensor

    def start(self, rounded: Tensor) -> None:
        """Start with these rounded values, and forget all crossings."""
        self.mean.copy_(rounded)
        self.crossings.zero_()

    def add(self, rounded: Tensor, is_held: Tensor | None = None) -> None:
        """Add the rounded values of a step. Weights of `is_held` (E, in, out) keep their state."""
        side = torch.sign(rounded - self.mean.to(rounded.dtype)).to(torch.int8)
        crossed = side * self.crossings.sign() < 0
        magnitude = (self.crossings.abs().clamp(max=_MOST) + crossed).clamp(min=1)
        crossings = torch.where(side == 0, self.crossings, side * magnitude)
        mean = torch.lerp(self.mean.float(), rounded.float(), _MEMORY).to(self.mean.dtype)
        if is_held is not None:
            crossings, mean = torch.where(is_held, self.crossings, crossings), torch.where(is_held, self.mean, mean)
        self.crossings.copy_(crossings)
        self.mean.copy_(mean)

    def have_crossed(self, times: int) -> Tensor:
        """Return which values have crossed their mean at least so many times."""
        return self.crossings.abs() > times

    def parts(self, weights: Tensor) -> Iterator[tuple[Tensor, "Flips"]]:
        """Split the weights (E, in, out) and their state into views of a few experts each."""
        if not weights.numel():  # FSDP2 can give a process no experts
            return
        size = max(1, _VALUES_AT_ONCE // max(1, weights[:1].numel()))
        for part, mean, crossings in zip(*(each.split(size) for each in (weights, *self)), strict=True):
            yield part, Flips(mean, crossings)
