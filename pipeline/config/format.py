"""Settings of `format`: the 4-bit format of the experts' weights."""

from dataclasses import dataclass
from enum import Enum
from itertools import chain

from pipeline.config.choices import add_members
from pipeline.numerics.formats import FORMATS, SCALE_RULES


class FormatName(Enum):
    """Number formats to train for: the rows of FORMATS."""

    add_members(vars(), FORMATS)


class ScaleRule(Enum):
    """Rules that choose the scale of a block: all values in SCALE_RULES. Formats with E8M0 scales have no `nearest`."""

    add_members(vars(), dict.fromkeys(chain(*SCALE_RULES.values())))


@dataclass
class FormatConfig:
    """The 4-bit format of the experts' weights."""

    name: FormatName = FormatName["mxfp4"]
    """mxfp4, nvfp4 or nvfp4_w4a4 (NVFP4 that also quantizes the experts' inputs, with calibrated scales)."""
    scale_rule: ScaleRule = ScaleRule["ceil"]
    """Scale of a block: ceil (no clipping), floor (may clip), mse (the better of two scales) or nearest (NVFP4)."""
    importance: bool = False
    """With scale_rule=mse, multiply each squared error by the mean square of its input channel during calibration."""
