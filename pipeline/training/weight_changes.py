"""Measure the share of expert weights that training has changed, and the share of changed 4-bit codes.

At a low learning rate, many weights move by less than a step of the format, and BF16 weights often do not move at all.
If few codes change, most updates do not survive rounding. The shares show this early, so you can raise the learning
rate. One expert of each stack is measured, which costs almost no time.
"""

import torch
from torch import Tensor, nn

from pipeline.models.adapters import expert_weights
from pipeline.numerics.codec import fake_quantize
from pipeline.numerics.formats import BlockFormat

_SAMPLED = slice(0, 1)  # experts of each stack


class WeightChanges:
    """Compares the weights of sampled experts with their values at the start of training.

    The values at the start stay in host memory, because they are used only during validation. Each comparison runs on
    the model's device. Stacks take turns, so the device holds the sample of only one stack at a time.
    """

    def __init__(self, model: nn.Module, block_format: BlockFormat) -> None:
        """Store the current weights of the sampled experts, for later comparison.

        Args:
            model: the model that will be trained. It may move to another device later.
            block_format: the format of the export.
        """
        self._model, self._format = model, block_format
        self._start = {name: weights.to("cpu", copy=True) for name, weights in expert_weights(model, _SAMPLED)}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return `moved_weights` and `changed_codes`. Both are shares of the sampled weights.

        If no expert is trained, the result is empty.
        """
        counts, total = [], 0
        for name, weights in expert_weights(self._model, _SAMPLED):
            start = self._start.get(name)
            if start is None:  # under ZeRO-3, the stack was empty at the start and is gathered now
                continue
            counts.append(self._count(start.to(weights.device), weights))
            total += weights.numel()
            del weights  # free the sample before the next stack's sample is made
        if not total:
            return {}
        moved, changed = torch.stack(counts).sum(0).tolist()
        return {"moved_weights": moved / total, "changed_codes": changed / total}

    def _count(self, start: Tensor, weights: Tensor) -> Tensor:
        """Return the number of weights that differ, and the number of rounded weights that differ.

        The result has the shape (2) and the type int64. It is on the device of the weights.
        """
        moved = (weights != start).sum()
        return torch.stack([moved, (self._round(weights) != self._round(start)).sum()])

    def _round(self, weights: Tensor) -> Tensor:
        return fake_quantize(weights.transpose(1, 2), self._format).transpose(1, 2)
