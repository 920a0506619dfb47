"""The block-scaled formats as data: a new format is a new row of FORMATS.

A block of consecutive values along the input dimension of a weight shares one scale; each value is stored as a
4-bit code. Source: OCP Microscaling Formats (MX) v1.0, sections 5.3.3 (e2m1), 5.4.1 (e8m0) and 6.3 (conversion).
"""

import math
from dataclasses import dataclass

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Value of each 3-bit magnitude code of e2m1; bit 3 of the 4-bit code is the sign."""

E2M1_VALUES = E2M1_MAGNITUDES + tuple(-magnitude for magnitude in E2M1_MAGNITUDES)
"""Value of each 4-bit code of e2m1."""

E8M0_BIAS = 127
E8M0_NAN = 255

E8M0_VALUES = (*(math.ldexp(1.0, byte - E8M0_BIAS) for byte in range(255)), math.nan)
"""Value of each scale byte: 2^(byte - 127); byte 255 is NaN."""


@dataclass(frozen=True)
class BlockFormat:
    """A 4-bit format with one scale per block.

    Attributes:
        name: the word used in configurations and artifacts.
        block_size: values per scale, along the input dimension.
        scale_rule: how the scale is chosen; `ceil` is the smallest power of two that keeps the block's largest
            magnitude within the range of e2m1, 2^ceil(log2(amax / 6)). It never saturates, and it is what
            ModelOpt's training kernel does; the OCP text's floor(log2(amax)) - 2 saturates above 6.
        bits_per_value: storage, scales included.
    """

    name: str
    block_size: int
    scale_rule: str
    bits_per_value: float


MXFP4 = BlockFormat(name="mxfp4", block_size=32, scale_rule="ceil", bits_per_value=4.25)

FORMATS = {MXFP4.name: MXFP4}
