"""How much of the fine-tuning reached the 4-bit weights, and what rounding cost: sums, and the figures they give.

Low-rate fine-tuning moves most weights by less than half a step of the format; rounding then returns the base model's
value, and what was learnt there is lost. The share that survives explains what quantization costs before anything is
evaluated.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.numerics.codec import differences, sum_of_squares, unequal_blocks
from pipeline.numerics.formats import BlockFormat
from pipeline.numerics.scales import values_of

_SUMS = ("squared_error", "squares", "moved", "changed", "values", "changed_scales", "saturated_blocks", "blocks")


@dataclass
class Survival:
    """Sums over expert weights.

    Attributes:
        sums: by name; counts but for `squared_error` and `squares`. `moved`: weights that training changed; `changed`:
            weights whose 4-bit value differs from the base model's; `changed_scales`: blocks with another scale and
            other values (the same values can be written with another scale).
    """

    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0.0))

    def add(
        self,
        trained: Tensor,
        rounded: Tensor,
        base: Tensor,
        rounded_base: Tensor,
        scales: tuple[Tensor, Tensor],
        saturated: Tensor,
        block_format: BlockFormat,
        units: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        """Add some experts.

        Args:
            trained, rounded: (E, in, out) weights, and what the export holds of them.
            base, rounded_base: the base model's, and its 4-bit values.
            scales: (E, out, nb) as stored, of the export and of the base model.
            saturated: (E, out, nb), which blocks of the export are.
            block_format: of the export.
            units: tensor scales (E) of the two, for formats that have one.
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
        """Add some experts (E, in, out) in so many blocks that are the base model's own: as `add`, in less time.

        They are what the base model's blocks decode to, so that nothing has moved, and nothing is rounded or saturates.
        """
        for name, added in (("squares", sum_of_squares(values)), ("values", values.numel()), ("blocks", blocks)):
            self.sums[name] += added

    def figures(self) -> dict[str, float | None]:
        """Shares and errors: `survival` is the share of moved weights whose 4-bit value changed; 0 where none moved.

        `snr_db` is None where rounding changed nothing.
        """
        sums = self.sums
        error = _share(sums["squared_error"], sums["squares"])
        return {
            "relative_squared_error": error,
            "snr_db": -10 * math.log10(error) if error else None,
            "moved_weights": _share(sums["moved"], sums["values"]),
            "changed_codes": _share(sums["changed"], sums["values"]),
            "changed_scales": _share(sums["changed_scales"], sums["blocks"]),
            "survival": min(1.0, _share(sums["changed"], sums["moved"])),
            "saturated_blocks": _share(sums["saturated_blocks"], sums["blocks"]),
        }


def total(parts: Iterable[dict[str, float]]) -> Survival:
    """The sums of several."""
    added = Survival()
    for sums in parts:
        for name in _SUMS:
            added.sums[name] += sums[name]
    return added


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
