"""How far training has moved the experts: the share of weights, and of 4-bit values, that differ from the start.

Low learning rates move many weights by less than a step of the format, and BF16 weights often not at all: whether
anything is being learnt that will survive rounding shows here, while there is still time to change the rate. Measured
on one expert of each stack, so that it costs nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.models.adapters import expert_weights
from pipeline.numerics.codec import fake_quantize
from pipeline.numerics.formats import BlockFormat

_SAMPLED = slice(0, 1)  # experts of each stack


@dataclass(frozen=True)
class _Start:
    weights: Tensor  # (1, in, out)
    rounded: Tensor


class Drift:
    """Remembers where the experts started."""

    def __init__(self, model: Any, block_format: BlockFormat) -> None:
        """Take the model as it is now for the start; `block_format` is what it will be, or is, rounded to."""
        self._model, self._format = model, block_format
        self._start = {name: _Start(weights.clone(), self._rounded(weights)) for name, weights in self._sample()}

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """`moved_weights` and `changed_codes`, shares of the sampled weights; empty if no expert can be looked at."""
        moved = changed = total = 0
        for name, weights in self._sample():
            start = self._start[name]
            moved += int((weights != start.weights).sum())
            changed += int((self._rounded(weights) != start.rounded).sum())
            total += weights.numel()
        return {"moved_weights": moved / total, "changed_codes": changed / total} if total else {}

    def _sample(self) -> list[tuple[str, Tensor]]:
        return [(name, weights.detach()) for name, weights in expert_weights(self._model, _SAMPLED)]

    def _rounded(self, weights: Tensor) -> Tensor:
        return fake_quantize(weights.transpose(1, 2), self._format).transpose(1, 2)
