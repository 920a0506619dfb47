"""Defines the block-scaled formats as data. A new format is a new row of FORMATS.

Consecutive values along the input dimension of a weight form a block, which has one scale. Each value is stored as a
4-bit code, e2m1. Sources:
- OCP Microscaling Formats (MX) v1.0, sections 5.3.3 (e2m1), 5.4.1 (e8m0) and 6.3 (conversion).
- NVIDIA's NVFP4: blocks of 16 with an e4m3 scale, and one FP32 scale per tensor.
- OCP 8-bit Floating Point (OFP8) v1.0 for e4m3.
"""

from dataclasses import dataclass, replace
from enum import Enum

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Value of each 3-bit magnitude code of e2m1. Bit 3 of the 4-bit code is the sign."""

E8M0_BIAS = 127
"""The value of a scale byte is 2^(byte - 127)."""

E8M0_NAN = 255
"""The scale byte that is NaN."""

E8M0_LARGEST = 252
"""Byte of the largest scale that `encode` writes. FP32 and BF16 can hold 6 * 2^(252 - 127), but not twice as much."""

E4M3_LARGEST = 126
"""Byte of the largest finite e4m3 value, 448."""

E4M3_NAN = 127


class ScaleType(Enum):
    """Storage type of a block's scale."""

    e8m0 = "e8m0"
    """A power of two, one byte."""
    e4m3 = "e4m3"
    """An 8-bit float, which is multiplied by one FP32 scale for the whole tensor."""


@dataclass(frozen=True)
class BlockFormat:
    """A 4-bit format with one scale per block.

    Attributes:
        name: name of the format in configurations and artifacts.
        block_size: number of values that share one scale. They are consecutive along the input dimension.
        scale_type: storage type of the scale.
        scale_rule: name of the rule that chooses the scale of a block. SCALE_RULES[scale_type] lists the names.
        bits_per_value: storage per value in bits. It includes the block scales, but not the tensor scale.
        quantizes_activations: whether the inputs of a quantized weight are quantized too (W4A4).
    """

    name: str
    block_size: int
    scale_type: ScaleType
    scale_rule: str
    bits_per_value: float
    quantizes_activations: bool = False

    def stores_like(self, other: "BlockFormat") -> bool:
        """Whether both formats store the same blocks and scales. Their scale rules may differ."""
        return (self.block_size, self.scale_type) == (other.block_size, other.scale_type)

    def with_rule(self, scale_rule: str) -> "BlockFormat":
        """Return the same format with another scale rule.

        Raises:
            ValueError: the scale type does not have this rule.
        """
        if scale_rule not in SCALE_RULES[self.scale_type]:
            raise ValueError(
                f"{self.name} has the scale rules {', '.join(SCALE_RULES[self.scale_type])}, not {scale_rule}"
            )
        return replace(self, scale_rule=scale_rule)


SCALE_RULES = {
    ScaleType.e8m0: ("ceil", "floor", "mse"),
    ScaleType.e4m3: ("nearest", "ceil", "floor", "mse"),
}
"""The rules for each type of scale. amax is the largest magnitude of a block. The largest value of e2m1 is 6.

- `ceil` takes the smallest scale with amax <= 6 * scale, so nothing saturates. ModelOpt's training kernel does this for
  e8m0.
- `floor` takes the scale 2^(floor(log2(amax)) - 2) for e8m0, as in the OCP text. For e4m3, it takes the largest scale
  that is at most amax / 6. Values may saturate.
- `nearest` exists only for e4m3. It takes the scale nearest to amax / 6, as in ModelOpt.
- `mse` compares two scales, and takes the scale with the smaller squared error of the block. For e8m0, it compares the
  scale of `ceil` and half of this scale. For e4m3, it compares the scale nearest to amax / 6 and the scale nearest to
  amax / 4. This is "four over six" (Cook et al. 2025, arXiv:2512.02010).
"""

MXFP4 = BlockFormat("mxfp4", 32, ScaleType.e8m0, "ceil", 4.25)
NVFP4 = BlockFormat("nvfp4", 16, ScaleType.e4m3, "nearest", 4.5)
NVFP4_W4A4 = replace(NVFP4, name="nvfp4_w4a4", quantizes_activations=True)

FORMATS = {row.name: row for row in (MXFP4, NVFP4, NVFP4_W4A4)}
