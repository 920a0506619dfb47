"""Arithmetic with powers of two works on bits, so it is exact on every device."""

import pytest
import torch

from pipeline.numerics.codec import encode, tensor_scale
from pipeline.numerics.formats import MXFP4, NVFP4
from pipeline.numerics.rounding import error_weights
from pipeline.numerics.scales import power_of_two, ratio, reciprocal

NORMAL = range(-126, 128)
"""Exponents of all powers of two that are normal float32 numbers."""


def powers(exponents: range) -> torch.Tensor:
    return torch.tensor([2.0**exponent for exponent in exponents])


def test_a_power_of_two_is_made_from_its_exponent() -> None:
    assert torch.equal(power_of_two(torch.tensor(NORMAL, dtype=torch.int32)), powers(NORMAL))


def test_a_reciprocal_has_the_bits_of_a_division_for_every_power_of_two_it_is_made_for() -> None:
    values = powers(range(-126, 127))
    assert torch.equal(reciprocal(values).view(torch.int32), (1.0 / values).view(torch.int32))


def test_a_ratio_has_the_bits_of_a_division_for_all_normal_powers_with_a_normal_ratio() -> None:
    one, other = torch.meshgrid(powers(NORMAL), powers(NORMAL), indexing="ij")
    exact = one.double() / other.double()
    is_normal = (exact >= 2.0**-126) & (exact <= 2.0**127)
    assert torch.equal(ratio(one, other)[is_normal], exact[is_normal].float())


@pytest.mark.parametrize("rule", ["nearest", "ceil", "floor", "mse"])
def test_reciprocals_are_exact_for_every_tensor_scale(rule: str) -> None:
    """The codec takes the reciprocal of tensor scales.

    A tensor scale depends only on the largest magnitude: on its exponent, and on whether its mantissa is above a limit.
    The limit is 1.3125 (under mse: 1.75). So these magnitudes give every tensor scale.
    """
    magnitudes = torch.cat([powers(range(-149, 128)) * factor for factor in (1.0, 1.3125, 1.5, 1.75, 1.9921875)])
    values = torch.zeros(len(magnitudes), 1, 16)
    values[:, 0, 0] = magnitudes
    scales = tensor_scale(values, NVFP4.with_rule(rule))
    assert scales is not None
    assert bool(((scales >= 2.0**-126) & (scales <= 2.0**126)).all())
    assert torch.equal(reciprocal(scales), 1.0 / scales)


@pytest.mark.parametrize("exponent", [-149, -126, -100, 0, 60, 127])
def test_importance_of_any_size_becomes_whole_numbers(exponent: int) -> None:
    """The largest importance in a block becomes a number from 2^15 to 2^16.

    The others are scaled by the same factor.
    """
    importance = torch.zeros(64)
    importance[3], importance[5], importance[40] = 2.0**exponent, 2.0 ** max(exponent - 3, -149), 0.0
    weights = error_weights(importance, torch.empty(1, 2, 32, 1)).flatten()
    assert weights[3] == 2.0**15
    assert weights[5] == (2.0**15 if exponent == -149 else 2.0**12)
    assert weights[4] == 0.0
    assert torch.equal(weights[32:], torch.ones(32, dtype=torch.float64))


def test_importance_chooses_the_scale_whatever_its_unit_is() -> None:
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 4
    weighted = [encode(values, MXFP4.with_rule("mse"), None, importance * unit)[1] for unit in (1.0, 2.0**-100)]
    assert torch.equal(*weighted)
    assert not torch.equal(weighted[0], encode(values, MXFP4.with_rule("mse"))[1])
