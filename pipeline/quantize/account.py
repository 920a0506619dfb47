"""The account of rounding: how much of the change that training made is kept, and how much noise is added.

Legend: E = experts, in = input dimension, out = output dimension, nb = blocks per row.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.numerics.comparison import add_up, changes, share, unequal_blocks
from pipeline.numerics.formats import BlockFormat
from pipeline.numerics.scales import values_of

_SUMS = (
    "change_squares",
    "kept_products",
    "rounded_squares",
    "trained_squares",
    "base_squares",
    "changed",
    "values",
    "scales_up",
    "scales_down",
    "blocks",
    "clipped",
    "adjusted_blocks",
)

Scales = tuple[Tensor, Tensor | None]
"""Stored scales of the blocks (E, out, nb), and tensor scales (E), or None if the format has no tensor scales."""


@dataclass
class Account:
    """Sums over expert weights. Below, Δ is the change by training, and Q - base is the change that rounding leaves.

    Attributes:
        sums: name -> sum.
            `change_squares` is |Δ|². `kept_products` is <Q - base, Δ>. `rounded_squares` is |Q - base|².
            `trained_squares` and `base_squares` are the squares of the trained and of the base weights.
            `changed` counts the weights whose 4-bit value differs from the base's.
            `scales_up` and `scales_down` count blocks with other values than the base's and a larger or smaller scale.
            `clipped` counts the weights beyond the largest value of their block.
            `adjusted_blocks` counts the blocks that were rounded again (see `rounding`).
    """

    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0.0))

    def add(
        self,
        trained: Tensor,
        rounded: Tensor,
        *,
        base: Tensor,
        rounded_base: Tensor,
        scales: tuple[Scales, Scales],
        block_format: BlockFormat,
        clipped: int,
        adjusted_blocks: int,
    ) -> None:
        """Add the sums of some experts.

        Args:
            trained: weights before rounding, (E, in, out).
            rounded: weights after rounding, (E, in, out).
            base: weights before training, (E, in, out).
            rounded_base: 4-bit values of the base, (E, in, out).
            scales: scales of the rounded weights and of the base.
            block_format: the format.
            clipped: see `sums`.
            adjusted_blocks: see `sums`.
        """
        for name, total in zip(_SUMS, changes(trained, rounded, base).tolist(), strict=False):
            self.sums[name] += total
        new, old = (values_of(*each) for each in scales)
        differs = unequal_blocks(rounded, rounded_base, block_format)
        counts: dict[str, Tensor | int] = {
            "changed": torch.count_nonzero(rounded != rounded_base),
            "scales_up": (differs & (new > old)).sum(),
            "scales_down": (differs & (new < old)).sum(),
            "values": rounded.numel(),
            "blocks": new.numel(),
            "clipped": clipped,
            "adjusted_blocks": adjusted_blocks,
        }
        for name, count in counts.items():
            self.sums[name] += int(count)

    def figures(self) -> dict[str, float | None]:
        """Convert the sums to the figures of the report.

        - `relative_change` is |Δ| / |base|.
        - `kept` is the share of the change that rounding keeps on average, <Q - base, Δ> / |Δ|². It is 1 without
          rounding and 0 if every weight snaps back. It is None if no weight changed.
        - `noise` is the rest of Q - base, relative to the weights: |Q - base - kept Δ| / |trained|.
        """
        sums = self.sums
        kept = sums["kept_products"] / sums["change_squares"] if sums["change_squares"] else None
        rest = sums["rounded_squares"] - (kept or 0.0) ** 2 * sums["change_squares"]
        return {
            "relative_change": math.sqrt(share(sums["change_squares"], sums["base_squares"])),
            "kept": kept,
            "noise": math.sqrt(share(max(0.0, rest), sums["trained_squares"])),
            "changed_codes": share(sums["changed"], sums["values"]),
            "changed_scales": share(sums["scales_up"] + sums["scales_down"], sums["blocks"]),
            "scales_up": share(sums["scales_up"], sums["blocks"]),
            "scales_down": share(sums["scales_down"], sums["blocks"]),
            "clipped_values": int(sums["clipped"]),
            "adjusted_blocks": int(sums["adjusted_blocks"]),
        }


def total(parts: Iterable[dict[str, float]]) -> Account:
    """Add up the sums of several stacks of experts."""
    return Account(add_up(_SUMS, parts))
