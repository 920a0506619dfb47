"""Measure the share of expert weights that training has changed, and the share of changed 4-bit codes.

At a low learning rate, many weights move by less than a step of the format, and BF16 weights often do not move at all.
If few codes change, most updates do not survive rounding. The shares show this early, so you can raise the learning
rate. One expert of each stack is measured, which costs almost no time.

If the experts are frozen, the first rows of all trained tensors are measured instead. The export rounds these tensors
to BF16, so an update that is too small for BF16 is lost.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pipeline.checkpoints.gpt_oss import EXPERT_WEIGHTS
from pipeline.models import sharding
from pipeline.models.adapters import expert_weights, is_adapted
from pipeline.numerics.codec import fake_quantize
from pipeline.numerics.formats import BlockFormat

_SAMPLED = slice(0, 1)  # experts of each stack
_ROWS = 64  # of each other tensor


class WeightChanges:
    """Compares the weights of sampled experts with their values at the start of training.

    The values at the start stay in host memory, because they are used only during validation. Each comparison runs on
    the model's device. Stacks take turns, so the device holds the sample of only one stack at a time.
    """

    def __init__(
        self, model: nn.Module, block_format: BlockFormat, others: Sequence[Callable[[], dict[str, float]]] = ()
    ) -> None:
        """Store the current weights of the sampled experts, for later comparison.

        Args:
            model: the model that will be trained. It may move to another device later.
            block_format: the format of the export.
            others: functions that return further figures about the weights. `measure` adds these figures.
        """
        self._model, self._format, self._others = model, block_format, others
        self._start = {name: weights.to("cpu", copy=True) for name, weights in expert_weights(model, _SAMPLED)}
        self._parts = {name: rows.to("cpu", copy=True) for name, rows in _bf16_parts(model)}

    def measure(self) -> dict[str, float]:
        """Return `moved_weights` and `changed_codes`, shares of the sampled weights, and the figures of `others`.

        If the experts are frozen, return `changed_bf16_values`. This is the share of the sampled values that differ
        from the start after rounding to BF16. If adapters are trained only outside of the experts, the result is empty.
        """
        found = self._measure_own()
        for other in self._others:
            found |= other()
        return found

    @torch.no_grad()
    def _measure_own(self) -> dict[str, float]:
        if self._parts:
            return {"changed_bf16_values": self._measure_parts()}
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

    def _measure_parts(self) -> float:
        differ = [(rows != self._parts[name].to(rows.device)).sum().cpu() for name, rows in _bf16_parts(self._model)]
        return int(torch.stack(differ).sum()) / sum(rows.numel() for rows in self._parts.values())

    def _count(self, start: Tensor, weights: Tensor) -> Tensor:
        """Return the number of weights that differ, and the number of rounded weights that differ.

        The result has the shape (2) and the type int64. It is on the device of the weights.
        """
        moved = (weights != start).sum()
        return torch.stack([moved, (self._round(weights) != self._round(start)).sum()])

    def _round(self, weights: Tensor) -> Tensor:
        return fake_quantize(weights.transpose(1, 2), self._format).transpose(1, 2)


def _bf16_parts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the first rows of each trained tensor, in BF16. If a tensor is sharded, the main process does.

    If experts or adapters are trained, nothing is yielded.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if is_adapted(model) or any(name.endswith(EXPERT_WEIGHTS) for name, _ in trained):
        return
    for name, parameter in trained:
        rows = sharding.first_part(parameter).detach()[:_ROWS]
        if rows.numel():
            yield name, rows.to(torch.bfloat16)
