"""Measures the rounding error, and the share of weight changes that survive rounding to 4 bits.

Fine-tuning at a low learning rate moves most weights by less than half a step of the 4-bit format. Rounding then
returns the base model's value, and the change is lost. The surviving share shows the cost of quantization before any
evaluation.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.numerics.comparison import add_up, differences, share, sum_of_squares, unequal_blocks
from pipeline.numerics.formats import BlockFormat
from pipeline.numerics.scales import values_of

_SUMS = ("squared_error", "squares", "moved", "changed", "values", "changed_scales", "saturated_blocks", "blocks")


@dataclass
class Survival:
    """Sums over expert weights.

    Attributes:
        sums: name -> sum. All sums are counts, except `squared_error` and `squares`. `moved` counts the weights that
            training changed. `changed` counts the weights whose 4-bit value differs from the base model's value.
            `changed_scales` counts the blocks that differ from the base model's block in both scale and values. A block
            that has the same values with another scale is not counted.
    """

    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0.0))

    def add(
        self,
        trained: Tensor,
        rounded: Tensor,
        *,
        base: Tensor,
        rounded_base: Tensor,
        scales: tuple[Tensor, Tensor],
        saturated: Tensor,
        block_format: BlockFormat,
        units: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        """Add the sums of some experts.

        Args:
            trained: weights before rounding, shape (E, in, out).
            rounded: weights of the export, shape (E, in, out).
            base: weights of the base model, shape (E, in, out).
            rounded_base: 4-bit values of the base model, shape (E, in, out).
            scales: stored scales of the export and of the base model. Both have the shape (E, out, nb).
            saturated: whether each block of the export has saturated values, shape (E, out, nb), bool.
            block_format: format of the export.
            units: tensor scales of the export and of the base model. Both have the shape (E). They are None if the
                format has no tensor scales.
        """
        counted = differences((trained, rounded, base, rounded_base))
        for name, total in zip(_SUMS, counted.tolist(), strict=False):
            self.sums[name] += total
        self.sums["values"] += trained.numel()
        has_other_scale = torch.ne(*(values_of(*each) for each in zip(scales, units, strict=True)))
        if bool(has_other_scale.any()):
            has_other_values = unequal_blocks(rounded, rounded_base, block_format)
            self.sums["changed_scales"] += int((has_other_scale & has_other_values).sum())
        self.sums["saturated_blocks"] += int(saturated.sum())
        self.sums["blocks"] += scales[0].numel()

    def add_untouched(self, values: Tensor, blocks: int) -> None:
        """Add some experts that training did not change. This gives the same sums as `add`, but takes less time.

        Args:
            values: (E, in, out) decoded weights of the base model. Rounding does not change these weights.
            blocks: number of blocks in these experts.
        """
        for name, added in (("squares", sum_of_squares(values)), ("values", values.numel()), ("blocks", blocks)):
            self.sums[name] += added

    def figures(self) -> dict[str, float | None]:
        """Convert the sums to shares and errors.

        `survival` is the share of moved weights whose 4-bit value changed, or 0 if no weight moved. `snr_db` is None if
        rounding changed no weight.
        """
        sums = self.sums
        error = share(sums["squared_error"], sums["squares"])
        return {
            "relative_squared_error": error,
            "snr_db": -10 * math.log10(error) if error else None,
            "moved_weights": share(sums["moved"], sums["values"]),
            "changed_codes": share(sums["changed"], sums["values"]),
            "changed_scales": share(sums["changed_scales"], sums["blocks"]),
            "survival": min(1.0, share(sums["changed"], sums["moved"])),
            "saturated_blocks": share(sums["saturated_blocks"], sums["blocks"]),
        }


def total(parts: Iterable[dict[str, float]]) -> Survival:
    """Add up the sums of several stacks of experts."""
    return Survival(add_up(_SUMS, parts))
