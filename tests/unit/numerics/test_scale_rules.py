"""The rules for scales agree with exact fractions, brute force over all candidates, and ml_dtypes.

Legend: in comments, the unit of a scale is the largest power of two that does not exceed the scale.
"""

import math
from bisect import bisect_left
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from tensor_bits import E8M0_VALUES, assert_same_bits, bits
from torch import Tensor

from pipeline.numerics import scales as scale_arithmetic
from pipeline.numerics import slabs
from pipeline.numerics.codec import decode, encode, fake_quantize, tensor_scale
from pipeline.numerics.formats import (
    E2M1_MAGNITUDES,
    FORMATS,
    MXFP4,
    NVFP4,
    SCALE_RULES,
    BlockFormat,
    ScaleType,
)

RULES = {f"{name}-{rule}": row.with_rule(rule) for name, row in FORMATS.items() for rule in SCALE_RULES[row.scale_type]}
"""Every format with each of its rules."""

E8M0_RULES = {name: row for name, row in RULES.items() if row.scale_type is ScaleType.e8m0}
MSE_RULES = {name: row for name, row in RULES.items() if row.scale_rule == "mse"}
LARGEST_E8M0 = 252
E4M3 = [Fraction(float(v)) for v in np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)]
"""Every finite, non-negative e4m3 value, by byte."""

TRAINED_TYPES = (torch.bfloat16, torch.float32)


def random_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, binades: int = 10) -> Tensor:
    """Draw values from a normal distribution, and put +0 and -0 among them. Blocks of 16 have different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).unflatten(-1, (-1, 16))
    sizes = torch.randint(-binades, 1, (*values.shape[:-1], 1), generator=generator)
    values = values * torch.exp2(sizes.float())
    values[..., 3], values[..., 11] = 0.0, -0.0
    return values.flatten(-2).to(dtype)


def on_the_mxfp4_grid(dtype: torch.dtype, bytes_: range) -> Tensor:
    """For each scale byte, make 8 blocks whose largest codes are 0 to 7. The shape is (len(bytes_), 8 * 32)."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(bytes_), 8, 32)
    codes = torch.randint(0, 8, shape, generator=generator) % torch.arange(1, 9).unsqueeze(-1)
    codes[..., 5] = torch.arange(8)
    signs = 1.0 - 2.0 * torch.randint(0, 2, shape, generator=generator)
    powers = torch.tensor([E8M0_VALUES[byte] for byte in bytes_])
    return (torch.tensor(E2M1_MAGNITUDES)[codes] * signs * powers[:, None, None]).flatten(-2).to(dtype)


def alone_in_blocks(maxima: Tensor, block_format: BlockFormat) -> Tensor:
    """Make one block for each value: (n,) -> (n, block_size). All other values are zero, and signs alternate."""
    blocks = torch.zeros(len(maxima), block_format.block_size, dtype=maxima.dtype)
    blocks[:, 7] = torch.where(torch.arange(len(maxima)) % 2 == 0, maxima, -maxima)
    return blocks


def bytes_of(scales: Tensor) -> list[int]:
    return scales.contiguous().view(torch.uint8).flatten().tolist()


def nearest_e4m3(exact: Fraction) -> int:
    """Find the byte from 1 to 126 whose e4m3 value is nearest to `exact`, with ties to even."""
    above = bisect_left(E4M3, exact)
    neighbours = range(max(1, min(above, 126) - 1), min(above, 126) + 1)
    return min(neighbours, key=lambda byte: (abs(E4M3[byte] - exact), byte % 2))


def maxima_around_e4m3(dtype: torch.dtype) -> Tensor:
    """Make maxima of blocks: multiply each e4m3 value and each midpoint by six.

    The two floats next to each product are maxima, too. The last maxima are all BF16 values from 2^-13 to 2^13.
    """
    midpoints = [(a + b) / 2 for a, b in pairwise(E4M3)]
    sixfold = torch.tensor([float(6 * value) for value in (*E4M3[1:], *midpoints)], dtype=dtype)
    ordinary = torch.arange((127 - 13) << 7, (127 + 13) << 7, dtype=torch.int16).view(torch.bfloat16)
    around = torch.cat([bits(sixfold) - 1, bits(sixfold), bits(sixfold) + 1]).view(dtype)
    return torch.cat([around, ordinary.to(dtype)])


@cache
def nearest_to_sixths(dtype: torch.dtype) -> tuple[list[Fraction], list[int]]:
    """Divide each of `maxima_around_e4m3` by six. Also return the bytes of the nearest e4m3 values."""
    sixths = [Fraction(amax) / 6 for amax in maxima_around_e4m3(dtype).tolist()]
    return sixths, [nearest_e4m3(sixth) for sixth in sixths]


# ---- e8m0


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_floor_of_e8m0_is_the_power_of_two_below_a_quarter_of_the_maximum(dtype: torch.dtype) -> None:
    """Test every finite BF16 value, or random FP32 values.

    The exponent of the scale is floor(log2(maximum)) - 2, and frexp returns floor(log2(maximum)) + 1.
    """
    if dtype == torch.bfloat16:
        maxima = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    else:
        generator = torch.Generator().manual_seed(2)
        maxima = torch.randint(1, 0x7F800000, (8000,), generator=generator, dtype=torch.int32).view(torch.float32)
    found = bytes_of(encode(alone_in_blocks(maxima, MXFP4), MXFP4.with_rule("floor"))[1])
    assert found == [min(max(math.frexp(value)[1] - 3 + 127, 0), LARGEST_E8M0) for value in maxima.tolist()]


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_floor_of_e8m0_saturates_only_maxima_above_six_scales(dtype: torch.dtype) -> None:
    values = random_values((60, 320), dtype)
    block_format = MXFP4.with_rule("floor")
    saturated = torch.empty((60, 10), dtype=torch.bool)
    blocks, scales = encode(values, block_format, saturated=saturated)
    amax = values.double().unflatten(-1, (-1, 32)).abs().amax(dim=-1)
    mantissa = torch.frexp(amax).mantissa  # in [0.5, 1). The mantissa of 6 times a power of two is 6 / 8 = 0.75
    assert torch.equal(saturated, mantissa > 0.75)
    assert 0.2 < saturated.float().mean() < 0.5, "both cases should occur"
    largest = decode(blocks, scales, torch.float32).unflatten(-1, (-1, 32)).abs().amax(dim=-1)
    unit = scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert torch.equal(largest.double()[saturated], (6 * torch.from_numpy(unit))[saturated])


@pytest.mark.parametrize("block_format", [MXFP4, NVFP4.with_rule("ceil")], ids=["mxfp4-ceil", "nvfp4-ceil"])
def test_nothing_saturates_under_ceil(block_format: BlockFormat) -> None:
    values = random_values((60, 320), torch.float32)
    saturated = torch.ones((60, 320 // block_format.block_size), dtype=torch.bool)
    encode(values, block_format, tensor_scale(values, block_format), saturated=saturated)
    assert not saturated.any()


# ---- e4m3


def test_scale_bytes_of_e4m3_have_the_values_of_torch_and_ml_dtypes() -> None:
    every = torch.arange(1, 127, dtype=torch.uint8)
    ones = torch.full((126, 1, 8), 0x22, dtype=torch.uint8)  # code 2 is one
    stored = every.view(torch.float8_e4m3fn).view(-1, 1)
    found = decode(ones, stored, torch.float32, torch.ones(())).double()[:, 0]
    assert torch.equal(found, torch.tensor([float(value) for value in E4M3[1:]], dtype=torch.float64))
    assert torch.equal(found, every.view(torch.float8_e4m3fn).double())


@pytest.mark.parametrize("exponent", [-110, -3, 0, 60])
def test_the_divisor_of_an_e4m3_scale_is_a_power_of_two_times_a_significand(exponent: int) -> None:
    every = torch.arange(1, 127, dtype=torch.uint8).view(1, 1, -1)
    parts = scale_arithmetic.divisor(every, ScaleType.e4m3, torch.tensor([2.0**exponent]))
    assert parts.significand is not None
    expected = [value * Fraction(2) ** exponent for value in E4M3[1:]]
    powers = [1 / Fraction(value) for value in parts.inverse.flatten().tolist()]
    significands = [Fraction(value) for value in parts.significand.flatten().tolist()]
    assert [a * b for a, b in zip(powers, significands, strict=True)] == expected
    assert [Fraction(value) for value in parts.scale.flatten().tolist()] == expected
    assert all(math.frexp(power)[0] == 0.5 for power in powers)
    assert all(1 <= significand < 2 for significand in significands)


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("exponent", [0, -40, 30])
def test_nearest_is_the_e4m3_value_nearest_to_a_sixth_of_the_maximum(dtype: torch.dtype, exponent: int) -> None:
    """Every 41st maximum is also tested by brute force over all e4m3 values."""
    maxima = maxima_around_e4m3(dtype)
    unit = torch.tensor(2.0**exponent)
    found = bytes_of(encode(alone_in_blocks(maxima * unit.to(dtype), NVFP4), NVFP4, unit)[1])
    sixths, nearest = nearest_to_sixths(dtype)
    assert found == nearest
    for sixth, byte in zip(sixths[::41], found[::41], strict=True):
        assert byte == min(range(1, 127), key=lambda b: (abs(E4M3[b] - sixth), b % 2))


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("rule", ["ceil", "floor"])
def test_ceil_and_floor_of_e4m3_are_the_values_above_and_below_a_sixth_of_the_maximum(
    dtype: torch.dtype, rule: str
) -> None:
    maxima = maxima_around_e4m3(dtype)
    block_format = NVFP4.with_rule(rule)
    values = alone_in_blocks(maxima, block_format)
    saturated = torch.empty((len(values), 1), dtype=torch.bool)
    scales = encode(values, block_format, torch.ones(()), saturated=saturated)[1]
    expected = []
    for sixth in nearest_to_sixths(dtype)[0]:
        above = bisect_left(E4M3, sixth)
        is_one = above < 127 and E4M3[above] == sixth
        byte = above if rule == "ceil" or is_one else above - 1
        expected.append(min(max(byte, 1), 126))
    assert bytes_of(scales) == expected
    beyond = [Fraction(amax) > 6 * E4M3[byte] for amax, byte in zip(maxima.tolist(), expected, strict=True)]
    assert saturated.flatten().tolist() == beyond


@pytest.mark.parametrize("rule", SCALE_RULES[ScaleType.e4m3])
@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_the_scale_byte_of_e4m3_is_never_zero_or_nan(dtype: torch.dtype, rule: str) -> None:
    """Values are divided by the scale, so the scale must not be zero.

    Blocks of zeros, and blocks of values far below the range of e4m3, get the scale byte 1.
    """
    maxima = torch.cat([torch.zeros(2), torch.exp2(torch.arange(-133, 128).float())]).to(dtype)
    for unit in (2.0**-110, 2.0**-40, 1.0, 2.0**100):
        block_format = NVFP4.with_rule(rule)
        values = alone_in_blocks(maxima.clamp(max=2.0**17 * unit), block_format)
        found = bytes_of(encode(values, block_format, torch.tensor(unit))[1])
        assert (min(found), max(found)) == (1, 126)


@pytest.mark.parametrize("rule", SCALE_RULES[ScaleType.e4m3])
@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_the_tensor_scale_is_the_smallest_power_of_two_that_fits(dtype: torch.dtype, rule: str) -> None:
    """The maximum may be up to 6 * 448 times the tensor scale, or 4 * 448 times under mse.

    Test every seventh BF16 maximum, and the floats around each boundary.
    """
    held = 4 * 448 if rule == "mse" else 6 * 448
    boundaries = torch.tensor([held * 2.0**exponent for exponent in range(-120, 117)], dtype=dtype)
    around = torch.cat([bits(boundaries) - 1, bits(boundaries), bits(boundaries) + 1]).view(dtype)
    ordinary = torch.arange(0, 0x7F80, 7, dtype=torch.int16).view(torch.bfloat16).to(dtype)
    maxima = torch.cat([around, ordinary])
    block_format = NVFP4.with_rule(rule)
    found = tensor_scale(alone_in_blocks(maxima, block_format).unsqueeze(1), block_format)
    assert found is not None
    assert (found.shape, found.dtype) == (maxima.shape, torch.float32)
    for amax, scale in zip(maxima.tolist(), found.tolist(), strict=True):
        exact = Fraction(scale)
        assert math.frexp(scale)[0] == 0.5
        assert Fraction(amax) <= held * exact
        assert exact == Fraction(2) ** -110 or Fraction(amax) > held * exact / 2


def test_every_matrix_has_its_own_tensor_scale_and_mxfp4_has_none() -> None:
    values = torch.ones(2, 3, 5, 32)
    values[1, 2, 4, 31] = -3000.0
    found = tensor_scale(values, NVFP4)
    assert found is not None
    assert found.tolist() == [[2.0**-11] * 3, [2.0**-11, 2.0**-11, 2.0]]
    assert tensor_scale(values, MXFP4) is None


@pytest.mark.parametrize("rule", SCALE_RULES[ScaleType.e4m3])
def test_no_block_needs_more_than_the_largest_e4m3_scale(rule: str) -> None:
    """So no scale is too large for e4m3, and no block saturates for this reason."""
    generator = torch.Generator().manual_seed(3)
    values = torch.rand(4000, 1, 16, generator=generator) * torch.exp2(torch.linspace(-30, 30, 4000))[:, None, None]
    block_format = NVFP4.with_rule(rule)
    unit = tensor_scale(values, block_format)
    assert unit is not None
    amax = values.amax(dim=(1, 2)).double() / unit.double()
    sought = {"nearest": [6], "ceil": [6], "floor": [6], "mse": [6, 4]}[rule]
    assert all(bool((amax / divisor <= 448).all()) for divisor in sought)


# ---- mse


def candidates_by_hand(amax: float, block_format: BlockFormat, unit: float) -> tuple[float, float]:
    """Compute the two candidates of mse by their definition in formats.SCALE_RULES."""
    if block_format.scale_type is ScaleType.e8m0:
        exponent = -127
        while Fraction(amax) > 6 * Fraction(2) ** exponent:
            exponent += 1
        return 2.0**exponent, 2.0 ** max(exponent - 1, -127)

    sixth, quarter = (Fraction(amax) / Fraction(unit) / largest for largest in (6, 4))
    return float(E4M3[nearest_e4m3(sixth)]) * unit, float(E4M3[nearest_e4m3(quarter)]) * unit


def weighted_error(values: np.ndarray, scale: float, weights: np.ndarray) -> tuple[float, float]:
    """Compute the squared error of a block under a scale, and the tolerance of this error.

    The codec rounds each error to 1/64 of a unit. A unit is the largest power of two that does not exceed the scale.
    So an error e is off by at most h = unit / 128. Its square is then off by at most 2 e h + h^2. If the importance
    weights of a block differ, the codec rounds them too. This changes a weight by at most 2^-15 of the largest weight.
    """
    magnitudes = np.asarray(E2M1_MAGNITUDES) * scale
    errors = np.abs(np.abs(values)[:, None] - magnitudes).min(axis=1)
    half_step = 2.0 ** (math.frexp(scale)[1] - 1) / 128
    doubt = np.sum(weights * (2 * errors * half_step + half_step**2))
    if weights.min() < weights.max():
        doubt += 2.0**-15 * weights.max() * np.sum(errors**2)
    return float(np.sum(weights * errors**2)), float(doubt)


class Choice(NamedTuple):
    """The squared errors of both candidates and of the chosen scale, and the tolerance for comparing them."""

    first: float
    second: float
    chosen: float
    tolerance: float


def choices(values: Tensor, block_format: BlockFormat, importance: Tensor | None) -> list[Choice]:
    """Return the codec's choice for each block."""
    unit = tensor_scale(values, block_format)
    stored = encode(values, block_format, unit, importance)[1]
    chosen = scale_arithmetic.values_of(stored, None if unit is None else unit.view(1)).flatten().tolist()
    blocks = values.double().reshape(-1, block_format.block_size).numpy()
    weights = np.ones(values.shape) if importance is None else importance.double().expand(values.shape).numpy()
    found = []
    for block, weight, scale in zip(blocks, weights.reshape(blocks.shape), chosen, strict=True):
        pair = candidates_by_hand(float(np.abs(block).max()), block_format, 1.0 if unit is None else float(unit))
        (first, doubt), (second, other_doubt) = (weighted_error(block, each, weight) for each in pair)
        found.append(Choice(first, second, (first, second)[pair.index(scale)], doubt + other_doubt))
    return found


@pytest.mark.parametrize("is_weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("block_format", [MXFP4, NVFP4], ids=["mxfp4", "nvfp4"])
def test_mse_chooses_the_candidate_with_the_smaller_error(
    block_format: BlockFormat, dtype: torch.dtype, is_weighted: bool
) -> None:
    """The codec rounds errors to 1/64 of a unit, so the comparison of two errors needs the tolerance in `Choice`."""
    values = random_values((25, 320), dtype)
    importance = torch.rand(320, generator=torch.Generator().manual_seed(4)) ** 4 if is_weighted else None
    found = choices(values, block_format.with_rule("mse"), importance)
    assert all(choice.chosen <= min(choice.first, choice.second) + choice.tolerance for choice in found)
    clear = [choice for choice in found if abs(choice.first - choice.second) > choice.tolerance]
    assert len(clear) > 0.7 * len(found), "too few blocks for the test"
    assert {choice.chosen == choice.first for choice in clear} == {True, False}
    losses = [choice.chosen / min(choice.first, choice.second) - 1 for choice in found]
    assert sum(losses) / len(losses) < 1e-3, "the resolution costs too much"


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_mse_is_never_worse_than_a_candidate_by_more_than_the_resolution(dtype: torch.dtype) -> None:
    """For e8m0, one candidate is ceil's scale. The codec computes the error of a value to within unit / 128."""
    values = random_values((50, 320), dtype)
    blocks = values.double().unflatten(-1, (-1, 32))

    def errors(rule: str) -> tuple[Tensor, Tensor]:
        decoded = fake_quantize(values, MXFP4.with_rule(rule)).double().unflatten(-1, (-1, 32))
        return (decoded - blocks).square().sum(dim=-1), (decoded - blocks).abs().sum(dim=-1)

    (mse, _), (ceil, absolute) = errors("mse"), errors("ceil")
    half_step = 2.0 ** torch.ceil(torch.log2(blocks.abs().amax(dim=-1) / 6)) / 128
    assert bool((mse <= ceil + 2 * (2 * absolute * half_step + 32 * half_step**2)).all())
    assert float(mse.sum()) < 0.97 * float(ceil.sum())


def test_the_first_of_two_equally_good_candidates_is_chosen() -> None:
    seven = torch.tensor([7.0] + [0.0] * 31)  # 8 under ceil, or 6 under the next smaller scale: both are off by 1
    assert bytes_of(encode(seven, MXFP4.with_rule("mse"))[1]) == [128]
    twelve = torch.tensor([12.0] + [0.0] * 15)  # 6 * 2 and 4 * 3 are both exact
    assert bytes_of(encode(twelve, NVFP4.with_rule("mse"), torch.ones(()))[1]) == [E4M3.index(Fraction(2))]


def test_importance_moves_the_choice_to_the_values_that_matter() -> None:
    """Under ceil, 8 is exact and 0.5 becomes 0. Under the next smaller scale, 0.5 is exact and 8 is not."""
    values = torch.tensor([8.0] + [0.5] * 31)
    on_the_eight, on_the_halves = torch.full((32,), 1e-3), torch.full((32,), 1e-3)
    on_the_eight[0], on_the_halves[1:] = 1.0, 1.0
    block_format = MXFP4.with_rule("mse")
    assert bytes_of(encode(values, block_format)[1]) == [127]
    assert bytes_of(encode(values, block_format, importance=on_the_eight)[1]) == [128]
    assert bytes_of(encode(values, block_format, importance=on_the_halves)[1]) == [127]


def test_importance_belongs_to_the_input_and_may_differ_between_experts() -> None:
    values = torch.tensor([8.0] + [0.5] * 31).expand(2, 3, 32)
    importance = torch.full((2, 32), 1e-3)
    importance[0, 0], importance[1, 1:] = 1.0, 1.0
    scales = encode(values, MXFP4.with_rule("mse"), importance=importance)[1]
    assert scales.squeeze(-1).tolist() == [[128] * 3, [127] * 3]


@pytest.mark.parametrize("level", [1.0, 0.3, 1e-30, 3e38, 0.0])
@pytest.mark.parametrize("block_format", MSE_RULES.values(), ids=MSE_RULES)
def test_equal_importance_gives_the_unweighted_choice(block_format: BlockFormat, level: float) -> None:
    """If the importance is zero everywhere in a block, all its values count equally."""
    values = random_values((2, 20, 320), torch.bfloat16)
    unit = tensor_scale(values, block_format)
    found = encode(values, block_format, unit, torch.full((320,), level))
    expected = encode(values, block_format, unit)
    assert all(bytes_of(one) == bytes_of(other) for one, other in zip(found, expected, strict=True))


def test_only_mse_uses_importance() -> None:
    values, importance = random_values((20, 320), torch.bfloat16), torch.arange(320.0)
    for block_format in (row for row in RULES.values() if row.scale_rule != "mse"):
        assert_same_bits(fake_quantize(values, block_format, None, importance), fake_quantize(values, block_format))


# ---- every rule


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("block_format", RULES.values(), ids=RULES)
def test_fake_quantization_is_encode_then_decode(block_format: BlockFormat, dtype: torch.dtype) -> None:
    values = random_values((3, 20, 320), dtype, binades=30)
    unit = tensor_scale(values, block_format)
    blocks, scales = encode(values, block_format, unit)
    assert_same_bits(fake_quantize(values, block_format), decode(blocks, scales, dtype, unit))
    assert_same_bits(fake_quantize(values, block_format, unit), decode(blocks, scales, dtype, unit))


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("block_format", RULES.values(), ids=RULES)
def test_storage_order_is_kept_and_changes_no_bit(block_format: BlockFormat, dtype: torch.dtype) -> None:
    values = random_values((3, 20, 320), dtype)
    turned = values.transpose(1, 2).contiguous().transpose(1, 2)
    unit = tensor_scale(values, block_format)
    expected, found = encode(values, block_format, unit), encode(turned, block_format, unit)
    assert [bytes_of(part) for part in found] == [bytes_of(part) for part in expected]
    assert all(part.is_contiguous() for part in found)
    assert_same_bits(fake_quantize(turned, block_format), fake_quantize(values, block_format))
    assert fake_quantize(turned, block_format).stride() == turned.stride()
    into = torch.empty_like(turned)
    assert decode(*found, dtype, unit, out=into) is into
    assert_same_bits(into, decode(*expected, dtype, unit))


@pytest.mark.parametrize("block_format", RULES.values(), ids=RULES)
def test_slabs_change_no_bit(block_format: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test slabs that hold several experts, one expert, some rows of blocks, or some lanes."""
    values = random_values((3, 4, 96), torch.bfloat16)
    importance = torch.rand(3, 96, generator=torch.Generator().manual_seed(5))
    unit = tensor_scale(values, block_format)
    whole = encode(values, block_format, unit, importance)
    plain = decode(*whole, torch.bfloat16, unit)
    for budget, lanes in ((2 * 4 * 96, 4), (4 * 96, 4), (4 * 32, 4), (4 * 32, 3), (1, 1)):
        monkeypatch.setitem(slabs.VALUES, "cpu", budget)
        monkeypatch.setitem(slabs.LANES, "cpu", lanes)
        found = encode(values, block_format, unit, importance)
        assert [bytes_of(part) for part in found] == [bytes_of(part) for part in whole]
        assert_same_bits(decode(*found, torch.bfloat16, unit), plain)
        assert_same_bits(fake_quantize(values, block_format, None, importance), plain)


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("block_format", RULES.values(), ids=RULES)
def test_rounding_a_rounded_result_changes_nothing(block_format: BlockFormat, dtype: torch.dtype) -> None:
    """Only scales with full precision are tested. Subnormal e4m3 scales are not.

    A block gets a subnormal scale if its maximum is below about 2^-14 of the matrix's maximum. The test has no such
    blocks.
    """
    once = fake_quantize(random_values((3, 40, 320), dtype), block_format)
    assert_same_bits(fake_quantize(once, block_format), once)


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("block_format", E8M0_RULES.values(), ids=E8M0_RULES)
def test_rules_of_e8m0_do_not_change_values_on_the_mxfp4_grid(block_format: BlockFormat, dtype: torch.dtype) -> None:
    values = on_the_mxfp4_grid(dtype, range(LARGEST_E8M0 + 1))
    assert_same_bits(fake_quantize(values, block_format), values)


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("lowest", [20, 119, 230])
def test_mse_of_e4m3_does_not_change_values_on_the_mxfp4_grid(lowest: int, dtype: torch.dtype) -> None:
    """If the largest code of a block is below 4, the e4m3 scale can be up to 2^3 times smaller than the MXFP4 scale.

    With 15 different MXFP4 scales, the blocks therefore use all 18 powers of two of e4m3.
    """
    values = on_the_mxfp4_grid(dtype, range(lowest, lowest + 15))
    assert_same_bits(fake_quantize(values, NVFP4.with_rule("mse")), values)


@pytest.mark.parametrize("rule", ["nearest", "ceil", "floor"])
def test_the_other_rules_of_e4m3_change_values_on_the_mxfp4_grid(rule: str) -> None:
    """For a maximum of 4, these rules need the scale 4/6 = 2/3, which e4m3 cannot represent exactly."""
    values = torch.tensor([4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.0, -0.5] * 4)
    assert fake_quantize(values, MXFP4).tolist() == fake_quantize(values, NVFP4.with_rule("mse")).tolist()
    assert not torch.equal(fake_quantize(values, NVFP4.with_rule(rule)), values)


@pytest.mark.parametrize("block_format", RULES.values(), ids=RULES)
def test_the_gradient_passes_straight_through_every_rule(block_format: BlockFormat) -> None:
    values = random_values((4, 320), torch.bfloat16).requires_grad_()
    gradient = random_values((4, 320), torch.bfloat16, seed=6)
    fake_quantize(values, block_format).backward(gradient)
    assert values.grad is not None
    assert_same_bits(values.grad, gradient)


def test_with_rule_returns_the_format_with_another_rule_and_does_not_change_it() -> None:
    assert NVFP4.with_rule("mse").scale_rule == "mse"
    assert NVFP4.with_rule("mse").with_rule(NVFP4.scale_rule) == NVFP4
    assert all(row.scale_rule in SCALE_RULES[row.scale_type] for row in FORMATS.values())
