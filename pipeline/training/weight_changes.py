"""Measure the shares of expert weights and of their 4-bit codes that training has changed.

At a low learning rate, many weights move by less than a step of the format, and BF16 weights often do not move at all.
If few codes change, most updates do not survive rounding. The shares show this early, so you can raise the rate.
One expert of each stack is measured, which costs almost no time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.models.adapters import expert_weights
from pipeline.numerics.codec import fake_quantize
from pipeline.numerics.formats import BlockFormat

_SAMPLED = slice(0, 1)  # experts of each stack


@dataclass(frozen=True)
class _Start:
    weights: Tensor  # (1, in, out)
    rounded: Tensor  # (1, in, out)


class WeightChanges:
    """Compares the weights of sampled experts with their values at the start of training."""

    def __init__(self, model: nn.Module, block_format: BlockFormat) -> None:
        """Store the current weights of the sampled experts, for later comparison.

        Args:
            model: the model that will be trained.
            block_format: the format of the export.
        """
        self._model, self._format = model, block_format
        self._start = {name: _Start(weights.clone(), self._round(weights)) for name, weights in self._sample()}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return `moved_weights` and `changed_codes`, shares of the sampled weights, or {} if none is trained."""
        moved = changed = total = 0
        for name, weights in self._sample():
            start = self._start.get(name)
            if start is None:  # ZeRO-3 had the stack empty at the start, and has it gathered now
                continue
            moved += int((weights != start.weights).sum())
            changed += int((self._round(weights) != start.rounded).sum())
            total += weights.numel()
        return {"moved_weights": moved / total, "changed_codes": changed / total} if total else {}

    def _sample(self) -> list[tuple[str, Tensor]]:
        return [(name, weights.detach()) for name, weights in expert_weights(self._model, _SAMPLED)]

    def _round(self, weights: Tensor) -> Tensor:
        return fake_quantize(weights.transpose(1, 2), self._format).transpose(1, 2)
