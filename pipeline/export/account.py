"""The account of rounding: its error, and how much of the change that training made it keeps.

Fine-tuning at a low learning rate moves most weights by less than half a step of the 4-bit format. Nearest rounding
then returns the base model's value, and the change is lost. The account shows this before any evaluation. `quantize`
and `export` give the same account.

Legend: E = experts, in = input dimension, out = output dimension, nb = blocks per row.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.checkpoints.notes import Note
from pipeline.numerics.comparison import add_up, changes, share, sum_of_squares, unequal_blocks
from pipeline.numerics.formats import BlockFormat
from pipeline.numerics.scales import values_of

_SUMS = (
    "squared_error",
    "squares",
    "moved",
    "changed",
    "change_squares",
    "kept_products",
    "rounded_squares",
    "base_squares",
    "values",
    "scales_up",
    "scales_down",
    "blocks",
    "clipped",
    "adjusted_blocks",
)

Figures = dict[str, float | None]
Scales = tuple[Tensor, Tensor | None]
"""Stored scales of the blocks (E, out, nb), and tensor scales (E), or None if the format has no tensor scales."""


@dataclass
class Account:
    """Sums over expert weights. Below, Δ is the change by training, and Q - base is the change that rounding leaves.

    Attributes:
        sums: name -> sum.
            `squared_error` is |Q - trained|². `squares` and `base_squares` are the squares of the trained and of the
            base weights.
            `moved` counts the weights that training changed. `changed` counts the weights whose 4-bit value differs
            from the base's.
            `change_squares` is |Δ|². `kept_products` is <Q - base, Δ>. `rounded_squares` is |Q - base|².
            `scales_up` and `scales_down` count blocks with other values than the base's and a larger or smaller scale.
            A block that has the same values with another scale is not counted.
            `clipped` counts the weights beyond the largest value of their block.
            `adjusted_blocks` counts the blocks that were rounded again (see `quantize.rounding`).
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
        adjusted_blocks: int = 0,
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
        counted = changes((trained, rounded, base, rounded_base))
        for name, total in zip(_SUMS, counted.tolist(), strict=False):
            self.sums[name] += total
        new, old = (values_of(*each) for each in scales)
        if bool(torch.ne(new, old).any()):
            differs = unequal_blocks(rounded, rounded_base, block_format)
            self.sums["scales_up"] += int((differs & (new > old)).sum())
            self.sums["scales_down"] += int((differs & (new < old)).sum())
        counts = {
            "values": rounded.numel(),
            "blocks": new.numel(),
            "clipped": clipped,
            "adjusted_blocks": adjusted_blocks,
        }
        for name, count in counts.items():
            self.sums[name] += count

    def add_untouched(self, values: Tensor, blocks: int) -> None:
        """Add some experts that training did not change. This gives the same sums as `add`, but takes less time.

        Args:
            values: (E, in, out) decoded weights of the base model. Rounding does not change these weights.
            blocks: number of blocks in these experts.
        """
        squares = sum_of_squares(values)
        sums = {"squares": squares, "base_squares": squares, "values": values.numel(), "blocks": blocks}
        for name, added in sums.items():
            self.sums[name] += added

    def figures(self) -> Figures:
        """Convert the sums to the figures of the account.

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
            "noise": math.sqrt(share(max(0.0, rest), sums["squares"])),
            **self._changed(),
            "scales_up": share(sums["scales_up"], sums["blocks"]),
            "scales_down": share(sums["scales_down"], sums["blocks"]),
            "clipped_values": int(sums["clipped"]),
            "adjusted_blocks": int(sums["adjusted_blocks"]),
        }

    def survival(self) -> Figures:
        """Convert the sums to the error of rounding, and to the share of moved weights that survive rounding.

        `survival` is the share of moved weights whose 4-bit value changed, or 0 if no weight moved. `snr_db` is None if
        rounding changed no weight.
        """
        sums = self.sums
        error = share(sums["squared_error"], sums["squares"])
        return {
            "relative_squared_error": error,
            "snr_db": -10 * math.log10(error) if error else None,
            "moved_weights": share(sums["moved"], sums["values"]),
            **self._changed(),
            "survival": min(1.0, share(sums["changed"], sums["moved"])),
        }

    def _changed(self) -> Figures:
        sums = self.sums
        return {
            "changed_codes": share(sums["changed"], sums["values"]),
            "changed_scales": share(sums["scales_up"] + sums["scales_down"], sums["blocks"]),
        }


def total(parts: Iterable[dict[str, float]]) -> Account:
    """Add up the sums of several stacks of experts."""
    return Account(add_up(_SUMS, parts))


def stacks_of_layers(notes: Sequence[Note]) -> dict[int, list[Note]]:
    """Collect the notes on stacks of experts by layer. These notes have `layer` and `sums` (see `Account`)."""
    experts = [note for note in notes if "sums" in note]
    layers = sorted({note["layer"] for note in experts})
    return {layer: [note for note in experts if note["layer"] == layer] for layer in layers}


def describe(figures: Figures, rounding: str) -> str:
    """Describe the kept change and the noise in words. `rounding` names the rounding, such as "nearest rounding"."""
    kept = figures["kept"]
    if kept is None:
        return f"training changed no expert; {rounding} adds {figures['noise']:.2%} noise"
    return (
        f"training changed the experts by {figures['relative_change']:.2%}; {rounding} keeps {kept:.1%} of the change"
        f" on average, and adds {figures['noise']:.2%} noise"
    )


def describe_blocks(figures: Figures) -> str:
    """Describe in words the scales that differ from the base's, and the clipped weights."""
    return (
        f"{figures['changed_scales']:.2%} of the scales differ from the base's ({figures['scales_up']:.2%} larger,"
        f" {figures['scales_down']:.2%} smaller); {figures['clipped_values']} values clipped"
    )
