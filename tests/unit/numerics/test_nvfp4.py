"""NVFP4, and the conversion from MXFP4, agree with ml_dtypes, with exact fractions and with ModelOpt.

Tests compare bits, so the sign of a zero matters, except where an oracle drops it. Legend: nb = number of blocks of a
row.
"""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from tensor_bits import assert_same_bits, bits
from torch import Tensor

from pipeline.numerics.codec import CodecError, decode, encode, fake_quantize, tensor_scale
from pipeline.numerics.convert import mxfp4_to_nvfp4
from pipeline.numerics.formats import E2M1_MAGNITUDES, MXFP4, NVFP4, NVFP4_W4A4, SCALE_RULES, ScaleType

MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
EVEN_CODES = (0, 2, 2, 4, 4, 6, 6)  # for each midpoint, the neighbouring code whose last bit is 0
TRAINED_TYPES = (torch.bfloat16, torch.float32)
E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""All finite, non-negative e4m3 values. The value of byte i has index i."""


def codes_of(blocks: Tensor) -> Tensor:
    """Unpack (..., n) bytes to (..., 2n) codes."""
    return torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)


def packed(codes: Tensor) -> Tensor:
    """Pack (..., 2n) codes into (..., n) bytes."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def random_weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Make normal values with zeros of both signs. Each block of 16 has its own magnitude."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).unflatten(-1, (-1, 16))
    values = values * torch.exp2(torch.randint(-12, 1, (*values.shape[:-1], 1), generator=generator).float())
    values[..., 2], values[..., 13] = 0.0, -0.0
    return values.flatten(-2).to(dtype)


def random_packed(scale_bytes: range, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Make MXFP4 blocks (2, len(scale_bytes), 4, 16) with random codes, and their scales.

    All blocks of a row have the same scale byte.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (2, len(scale_bytes), 4, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.tensor(scale_bytes, dtype=torch.uint8)[:, None].expand(2, -1, 4).contiguous()


# ---- encode and decode


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("unit", [2.0**-110, 2.0**-13, 1.0, 2.0**100])
def test_every_code_decodes_with_every_scale_as_ml_dtypes_does(dtype: torch.dtype, unit: float) -> None:
    elements = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    expected = torch.from_numpy(elements * (E4M3[1:, None] * np.float32(unit)))
    blocks = packed(torch.arange(16).expand(126, 1, 16))
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).view(-1, 1)
    found = decode(blocks, scales, dtype, torch.tensor(unit))
    assert_same_bits(found, expected.to(dtype))
    assert_same_bits(found.float(), expected)  # BF16 is exact too


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_codes_equal_the_cast_in_ml_dtypes(dtype: torch.dtype) -> None:
    values = random_weights((200, 320), torch.float32).bfloat16().to(dtype)  # few significant bits make many ties
    unit = tensor_scale(values, NVFP4)
    blocks, scales = encode(values, NVFP4, unit)
    assert scales.dtype == torch.float8_e4m3fn
    divisors = scales.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64) * float(unit)
    scaled = values.double().unflatten(-1, (-1, 16)).numpy() / divisors[..., None]
    assert np.isin(np.abs(scaled), MIDPOINTS).sum() > 200, "too few ties for the test"
    expected = scaled.astype(np.float32).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert np.array_equal(codes_of(blocks).numpy(), expected)


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exponent", [-90, 0, 90])
def test_ties_go_to_even_and_the_floats_beside_them_to_different_codes(
    dtype: torch.dtype, sign: int, exponent: int
) -> None:
    """Test every midpoint at every scale byte. BF16 has 8 significant bits, so midpoint * scale is exact."""
    unit = Fraction(2) ** exponent
    thresholds = [[Fraction(m) * Fraction(float(s)) * unit for m in MIDPOINTS] for s in E4M3[1:]]
    ties = torch.tensor([[float(t) for t in row] for row in thresholds], dtype=dtype)
    assert [[Fraction(v) for v in row] for row in ties.tolist()] == thresholds
    values = torch.zeros(126, 32, dtype=dtype)
    values[:, 0] = values[:, 16] = torch.tensor([6 * float(s) * float(unit) for s in E4M3[1:]], dtype=dtype)
    values[:, 1:8] = ties
    values[:, 8:15] = (bits(ties) - 1).view(dtype)
    values[:, 17:24] = (bits(ties) + 1).view(dtype)
    blocks, scales = encode(values * sign, NVFP4, torch.tensor(float(unit)))
    assert scales.view(torch.uint8).tolist() == [[byte, byte] for byte in range(1, 127)]
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[:15] = torch.tensor([7, *EVEN_CODES, *range(7)])
    codes[16:24] = torch.tensor([7, *range(1, 8)])
    codes[:] += 8 if sign < 0 else 0  # also the codes of zeros, because -1 * 0.0 is -0.0
    assert torch.equal(codes_of(blocks).flatten(-2), codes.expand(126, -1))


@pytest.mark.parametrize("rule", SCALE_RULES[ScaleType.e4m3])
@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_every_value_goes_to_the_nearest_multiple_of_its_scale(dtype: torch.dtype, rule: str) -> None:
    """Compute the nearest code with exact fractions.

    Ties go to the even code. Values that are too large get the largest code.
    """
    block_format = NVFP4.with_rule(rule)
    values = random_weights((4, 160), dtype)
    unit = tensor_scale(values, block_format)
    assert unit is not None
    blocks, scales = encode(values, block_format, unit)
    magnitudes = [Fraction(magnitude) for magnitude in E2M1_MAGNITUDES]
    stored = scales.view(torch.uint8).flatten().repeat_interleave(16).tolist()
    for value, code, byte in zip(values.flatten().tolist(), codes_of(blocks).flatten().tolist(), stored, strict=True):
        scaled = abs(Fraction(value)) / (Fraction(float(E4M3[byte])) * Fraction(float(unit)))
        assert code & 7 == min(range(8), key=lambda c: (abs(magnitudes[c] - scaled), c % 2))
        assert bool(code & 8) == (math.copysign(1.0, value) < 0)


def test_bf16_weights_are_quantized_as_in_modelopt_under_the_same_tensor_scale() -> None:
    """ModelOpt differs only for zeros: it drops their signs, and gives blocks of zeros the scale 1."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    values = random_weights((300, 640), torch.bfloat16)
    unit = tensor_scale(values, NVFP4)
    blocks, scales = encode(values, NVFP4, unit)
    theirs, their_scales, _ = NVFP4QTensor.quantize(values.clone(), 16, weights_scaling_factor_2=unit)
    assert torch.equal(scales.view(torch.uint8), their_scales.view(torch.uint8))
    codes, their_codes = codes_of(blocks.flatten(-2)), codes_of(theirs._quantized_data)
    assert torch.equal(torch.where(codes & 7 == 0, 0, codes), torch.where(their_codes & 7 == 0, 0, their_codes))


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("units", [(2.0**-12, 2.0**3), (0.0371, 1.7e-5)], ids=["powers_of_two", "others"])
def test_decoding_equals_modelopts_decoding(dtype: torch.dtype, units: tuple[float, float]) -> None:
    """Test tensor scales that are powers of two, and tensor scales that are not.

    Other tools use the tensor scale amax / (6 * 448), which is rarely a power of two. ModelOpt decodes -0 as 0.
    """
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    blocks = packed(torch.arange(16).expand(2, 126, 1, 16))
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, -1, 1).expand(2, -1, -1)
    unit = torch.tensor(units)
    theirs = NVFP4QTensor(torch.Size((2, 126, 16)), dtype, blocks.flatten(-2))
    expected = theirs.dequantize(dtype=dtype, scale=scales, double_scale=unit[:, None, None], block_sizes={-1: 16})
    found = decode(blocks, scales, dtype, unit)
    assert_same_bits(torch.where(found == 0, 0.0, found), expected)
    assert bool((found[..., 8] == 0).all())
    assert bool(torch.signbit(found[..., 8:]).all())


def test_each_expert_has_its_own_tensor_scale() -> None:
    values = random_weights((2, 3, 8, 64), torch.float32) * torch.exp2(torch.arange(6.0)).view(2, 3, 1, 1) * 3
    unit = tensor_scale(values, NVFP4)
    assert unit is not None
    assert len(set(unit.flatten().tolist())) > 3
    blocks, scales = encode(values, NVFP4, unit)
    assert (blocks.shape, scales.shape) == ((2, 3, 8, 4, 8), (2, 3, 8, 4))
    whole = decode(blocks, scales, torch.float32, unit)
    for i, j in np.ndindex(2, 3):
        one = encode(values[i, j], NVFP4, unit[i, j])
        assert torch.equal(one[0], blocks[i, j])
        assert torch.equal(one[1].view(torch.uint8), scales[i, j].view(torch.uint8))
        assert_same_bits(decode(*one, torch.float32, unit[i, j]), whole[i, j])
        assert_same_bits(fake_quantize(values[i, j], NVFP4), whole[i, j])


def test_leading_dimensions_are_kept() -> None:
    for lead in ((), (5,), (2, 3), (2, 1, 3)):
        values = random_weights((*lead, 96), torch.bfloat16)
        unit = tensor_scale(values, NVFP4)
        assert unit is not None
        assert unit.shape == lead[:-1]
        blocks, scales = encode(values, NVFP4, unit)
        assert (blocks.shape, scales.shape) == ((*lead, 6, 8), (*lead, 6))
        assert decode(blocks, scales, tensor_scale=unit).shape == fake_quantize(values, NVFP4).shape == values.shape


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_zeros_and_values_that_round_to_zero_keep_their_sign(dtype: torch.dtype) -> None:
    tiny = 2.0**-133
    values = torch.tensor([[6.0, 0.2, -0.2, 0.0, -0.0, tiny, -tiny, 0.0] * 2, [0.0, -0.0] * 8], dtype=dtype)
    expected = torch.tensor([[6.0, 0.0, -0.0, 0.0, -0.0, 0.0, -0.0, 0.0] * 2, [0.0, -0.0] * 8], dtype=dtype)
    assert_same_bits(fake_quantize(values, NVFP4), expected)
    assert_same_bits(fake_quantize(torch.zeros_like(values), NVFP4), torch.zeros_like(values))
    assert_same_bits(fake_quantize(-torch.zeros_like(values), NVFP4), -torch.zeros_like(values))


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_subnormal_weights_become_zeros_with_their_sign(dtype: torch.dtype) -> None:
    """The tensor scale is at least 2^-110, so that its products with block scales are normal floats.

    With the tensor scale 2^-110, the smallest product is 2^-119. Values up to a quarter of this product become zero.
    """
    values = torch.tensor([2.0**-130, -(2.0**-127)] * 8, dtype=dtype)
    assert_same_bits(fake_quantize(values, NVFP4), torch.tensor([0.0, -0.0] * 8, dtype=dtype))
    small = torch.tensor([2.0**-119, -(2.0**-120), -(2.0**-121), 2.0**-122] * 4, dtype=dtype)
    assert_same_bits(fake_quantize(small, NVFP4), torch.tensor([2.0**-119, -(2.0**-120), -0.0, 0.0] * 4, dtype=dtype))


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_the_largest_finite_values_stay_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = torch.tensor([largest, -largest, largest / 3, 1.0] * 4, dtype=dtype)
    found = fake_quantize(values, NVFP4)
    assert bool(found.isfinite().all())


def test_values_beyond_a_given_tensor_scale_saturate() -> None:
    values = torch.tensor([3000.0, -1e30] + [100.0] * 14)
    blocks, scales = encode(values, NVFP4, torch.ones(()))
    assert decode(blocks, scales, torch.float32, torch.ones(())).tolist()[:2] == [2688.0, -2688.0]


# ---- misuse


@pytest.mark.parametrize("block_format", [NVFP4, NVFP4_W4A4], ids=["nvfp4", "nvfp4_w4a4"])
def test_encoding_nvfp4_needs_a_tensor_scale(block_format: object) -> None:
    with pytest.raises(TypeError, match=r"nvfp4.* needs a tensor scale"):
        encode(torch.ones(16), block_format)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantizes", [encode, fake_quantize])
def test_mxfp4_with_a_tensor_scale_is_an_error(quantizes: object) -> None:
    with pytest.raises(TypeError, match="mxfp4 takes no tensor scale"):
        quantizes(torch.ones(32), MXFP4, torch.ones(()))  # type: ignore[operator]


@pytest.mark.parametrize("rule", SCALE_RULES[ScaleType.e4m3])
@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_nan_and_inf_raise_an_error_that_names_the_first_bad_block(bad: float, dtype: torch.dtype, rule: str) -> None:
    values = torch.ones(2, 3, 48, dtype=dtype)
    values[1, 0, 20] = values[1, 2, 0] = values[1, 2, 15] = bad
    block_format = NVFP4.with_rule(rule)
    for quantize in (lambda: fake_quantize(values, block_format), lambda: encode(values, block_format, torch.ones(2))):
        with pytest.raises(CodecError, match=r"2 blocks, the first at index \[1, 0, 1\]") as caught:
            quantize()
        assert caught.value.block == (1, 0, 1)


def test_an_input_dimension_that_is_not_a_multiple_of_the_block_size_is_an_error() -> None:
    with pytest.raises(CodecError, match="24 is not a multiple of the block size 16"):
        fake_quantize(torch.ones(24), NVFP4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_types_that_would_be_rounded_twice_or_overflow_are_errors(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        fake_quantize(torch.ones(16, dtype=dtype), NVFP4)


def test_only_the_format_decides_whether_activations_are_quantized() -> None:
    """NVFP4_W4A4 stores the same weights as NVFP4."""
    assert (NVFP4.quantizes_activations, NVFP4_W4A4.quantizes_activations) == (False, True)
    values = random_weights((20, 160), torch.bfloat16)
    assert_same_bits(fake_quantize(values, NVFP4_W4A4), fake_quantize(values, NVFP4))


# ---- MXFP4 -> NVFP4


@pytest.mark.parametrize("lowest", [18, 100, 127, 235])
def test_exponents_within_17_of_the_largest_convert_without_loss(lowest: int) -> None:
    """Test all 18 powers of two of e4m3 in one matrix, with random codes and zeros of both signs."""
    blocks, scales = random_packed(range(lowest, lowest + 18))
    converted = mxfp4_to_nvfp4(blocks, scales)
    assert converted.changed_blocks == 0
    assert (converted.blocks.shape, converted.scales.shape) == ((2, 18, 8, 8), (2, 18, 8))
    assert converted.scales.dtype == torch.float8_e4m3fn
    assert torch.equal(converted.blocks.flatten(-2), blocks.flatten(-2)), "codes must not change"
    assert converted.tensor_scale.tolist() == [2.0 ** (lowest + 17 - 127 - 8)] * 2
    for dtype in TRAINED_TYPES:
        found = decode(converted.blocks, converted.scales, dtype, converted.tensor_scale)
        assert_same_bits(found, decode(blocks, scales, dtype))


def test_modelopt_decodes_converted_weights_to_the_same_values() -> None:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    blocks, scales = random_packed(range(110, 128))
    converted = mxfp4_to_nvfp4(blocks, scales)
    theirs = NVFP4QTensor(torch.Size((2, 18, 128)), torch.float32, converted.blocks.flatten(-2)).dequantize(
        scale=converted.scales, double_scale=converted.tensor_scale[:, None, None], block_sizes={-1: 16}
    )
    assert torch.equal(theirs, decode(blocks, scales, torch.float32))


@pytest.mark.parametrize("scale_bytes", [range(90, 120), range(30), range(14), range(220, 255)], ids=str)
def test_blocks_out_of_range_are_rounded_and_the_changed_ones_are_counted(scale_bytes: range) -> None:
    """Some blocks whose scales are out of range keep their values, because another scale represents them exactly.

    Scales near 2^-127 are tested too.
    """
    blocks, scales = random_packed(scale_bytes)
    blocks[:, ::2, 1:3] &= 0b01000100  # keeps only the values 0 and 2, which are exact under 2 and 4 times the scale
    converted = mxfp4_to_nvfp4(blocks, scales)
    found = decode(converted.blocks, converted.scales, torch.float32, converted.tensor_scale)
    before = decode(blocks, scales, torch.float32)
    is_changed = (found != before).unflatten(-1, (-1, 16)).any(dim=-1)
    assert converted.changed_blocks == int(is_changed.sum()) > 0
    assert torch.equal(torch.signbit(found), torch.signbit(before))
    largest = scales.flatten(1).amax(dim=1)
    unit = [max(2.0 ** (int(byte) - 135), 2.0**-110) for byte in largest]
    assert converted.tensor_scale.tolist() == unit
    smallest = converted.tensor_scale * 2.0**-9
    power = torch.exp2(scales.double() - 127).repeat_interleave(2, dim=-1)
    in_range = power >= smallest[:, None, None].double()
    assert not bool((is_changed & in_range).any())
    assert bool((~is_changed & ~in_range).any())
    nearest = (before.double().abs() / smallest[:, None, None]).numpy().astype(ml_dtypes.float4_e2m1fn)
    rounded = torch.from_numpy(nearest.astype(np.float64)) * smallest[:, None, None]
    out_of_range = ~in_range.repeat_interleave(16, dim=-1)
    assert torch.equal(found.double().abs()[out_of_range], rounded[out_of_range])


def test_each_expert_has_its_own_range() -> None:
    """The weights of one expert are far smaller than the weights of the other."""
    blocks, _ = random_packed(range(18))
    scales = torch.stack([torch.arange(20, 38), torch.arange(200, 218)]).to(torch.uint8)
    scales = scales.unsqueeze(-1).expand(2, 18, 4).contiguous()
    converted = mxfp4_to_nvfp4(blocks, scales)
    assert converted.changed_blocks == 0
    assert converted.tensor_scale.tolist() == [2.0**-98, 2.0**82]


def test_blocks_of_zeros_do_not_widen_the_range_and_keep_their_signs() -> None:
    """Blocks of zeros may have any scale, and a whole matrix may be zero."""
    blocks, scales = random_packed(range(100, 118))
    blocks[0, 3:5] &= 0x88
    scales[0, 3], scales[0, 4] = 0, 250
    blocks[1] &= 0x88
    converted = mxfp4_to_nvfp4(blocks, scales)
    assert converted.changed_blocks == 0
    assert converted.tensor_scale.tolist() == [2.0 ** (117 - 127 - 8), 2.0**-110]
    found = decode(converted.blocks, converted.scales, torch.float32, converted.tensor_scale)
    assert_same_bits(found, decode(blocks, scales, torch.float32))


def test_half_a_block_of_zeros_does_not_widen_the_range() -> None:
    """An MXFP4 block becomes two blocks of 16, which are converted independently."""
    blocks = torch.full((1, 2, 16), 0x12, dtype=torch.uint8)
    blocks[0, 1, :8] = 0
    scales = torch.tensor([[127, 110]], dtype=torch.uint8)
    assert mxfp4_to_nvfp4(blocks, scales).changed_blocks == 0
    scales[0, 1] = 109  # now the scale of block 1 is out of range, and one half of this block is not zero
    assert mxfp4_to_nvfp4(blocks, scales).changed_blocks == 1


@pytest.mark.parametrize("lead", [(), (1,), (2, 3)], ids=str)
def test_any_leading_dimensions_convert(lead: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (*lead, 5, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(90, 120, (*lead, 5, 2), generator=generator, dtype=torch.uint8)
    converted = mxfp4_to_nvfp4(blocks, scales)
    assert (converted.blocks.shape, converted.scales.shape) == ((*lead, 5, 4, 8), (*lead, 5, 4))
    assert converted.tensor_scale.shape == lead
    found = decode(converted.blocks, converted.scales, torch.float32, converted.tensor_scale)
    is_changed = (found != decode(blocks, scales, torch.float32)).unflatten(-1, (-1, 16)).any(dim=-1)
    assert converted.changed_blocks == int(is_changed.sum()) > 0


def test_conversion_does_not_change_its_input() -> None:
    blocks, scales = random_packed(range(90, 120))
    before = blocks.clone(), scales.clone()
    mxfp4_to_nvfp4(blocks, scales)
    assert torch.equal(blocks, before[0])
    assert torch.equal(scales, before[1])
