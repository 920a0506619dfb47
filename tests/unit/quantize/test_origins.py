"""Which scales of a base a format can take."""

from typing import Any

import pytest

from pipeline.config import QuantizeConfig, RoundingMethod, RoundingScales
from pipeline.errors import UserError
from pipeline.numerics.formats import BlockFormat, ScaleType
from pipeline.quantize import origins

OTHER = BlockFormat("nvfp4_32", 32, ScaleType.e4m3, "mse", 4.25)
NOT_OPENED: Any = None


def test_blocks_of_another_form_do_not_take_the_scales_of_the_base() -> None:
    settings = QuantizeConfig(method=RoundingMethod.stochastic)
    assert origins.find_packed(NOT_OPENED, settings, OTHER) is None
    assert origins.choose_rule(settings, None, OTHER.scale_rule) == "mse"
    with pytest.raises(UserError, match=r"quantize\.scales=base: .* do not fit the blocks of format=nvfp4_32"):
        origins.find_packed(NOT_OPENED, QuantizeConfig(scales=RoundingScales.base), OTHER)
