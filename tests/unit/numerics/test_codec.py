"""The codec agrees with independent oracles: ml_dtypes, exact fractions, and the decoders of ModelOpt and transformers.

Tests compare bits, so the sign of a zero matters. Legend: nb = number of blocks.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from tensor_bits import E2M1_VALUES, E8M0_VALUES, INTEGERS, assert_same_bits, bits
from torch import Tensor

from pipeline.numerics.codec import CodecError, decode, encode, fake_quantize, tensor_scale
from pipeline.numerics.formats import FORMATS, MXFP4, BlockFormat

MAGNITUDES = (0, Fraction(1, 2), 1, Fraction(3, 2), 2, 3, 4, 6)
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
EVEN_CODES = (0, 2, 2, 4, 4, 6, 6)  # for each midpoint, the neighbouring code whose last bit is 0
LARGEST_SCALE = 252  # the largest value is 6 * 2^(252 - 127), which BF16 and FP32 can represent. Byte 253 gives Inf

TRAINED_TYPES = (torch.bfloat16, torch.float32)


def assert_same_bytes(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == torch.uint8
        assert torch.equal(one, other)


def exact_scale(amax: float) -> int:
    """Find the smallest power of two s from 2^-127 to 2^125 with amax <= 6 s, in exact arithmetic. Returns its byte."""
    exponent = max(-127, math.frexp(amax)[1] - 5) if amax else -127
    while Fraction(amax) > 6 * Fraction(2) ** exponent and exponent + 127 < LARGEST_SCALE:
        exponent += 1
    return exponent + 127


def exact_code(value: float, scale: int) -> int:
    """Find the e2m1 code nearest to value / 2^(scale - 127), ties to even, in exact arithmetic."""
    magnitude = abs(Fraction(value)) / Fraction(2) ** (scale - 127)
    code = min(range(8), key=lambda c: (abs(MAGNITUDES[c] - magnitude), c % 2))
    return code | (8 if math.copysign(1.0, value) < 0 else 0)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Unpack (..., n) bytes to (..., 2n) codes."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def put_in_blocks(values: Tensor) -> Tensor:
    """Make one block for each value: (n,) -> (n, 32). All other values of the block are zero.

    The positions and signs of the values change from block to block.
    """
    blocks = torch.zeros(len(values), 32, dtype=values.dtype)
    rows = torch.arange(len(values))
    blocks[rows, rows % 32] = torch.where(rows % 3 == 0, -values, values)
    return blocks


def wide_range(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Make random values with zeros of both signs. The magnitudes of two blocks differ by a factor of up to 2^20."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).unflatten(-1, (-1, 32))
    values = values * torch.exp2(torch.randint(-14, 7, (*values.shape[:-1], 1), generator=generator).float())
    values[..., 3], values[..., 30] = 0.0, -0.0
    return values.flatten(-2).to(dtype)


def random_packed(scales: range) -> tuple[Tensor, Tensor]:
    """Make blocks (len(scales), 8, 16) and scales (len(scales), 8).

    The largest magnitude in block i of a row is code i.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (len(scales), 8, 32)
    magnitudes = torch.randint(0, 8, shape, generator=generator) % torch.arange(1, 9).unsqueeze(-1)
    magnitudes[..., 5] = torch.arange(8)
    codes = (magnitudes | torch.randint(0, 2, shape, generator=generator) << 3).to(torch.uint8)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed, torch.tensor(scales, dtype=torch.uint8).unsqueeze(-1).expand(-1, 8).contiguous()


def test_e2m1_and_e8m0_values_equal_ml_dtypes() -> None:
    e2m1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    e8m0 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert_same_bits(torch.tensor(E2M1_VALUES), torch.from_numpy(e2m1))
    assert_same_bits(torch.tensor(E8M0_VALUES[:255]), torch.from_numpy(e8m0[:255]))
    assert math.isnan(E8M0_VALUES[255])
    assert math.isnan(e8m0[255])


@pytest.mark.parametrize("block_format", FORMATS.values(), ids=FORMATS)
def test_every_format_has_the_declared_bits_per_value(block_format: BlockFormat) -> None:
    values = torch.ones(3, 4 * block_format.block_size)
    blocks, scales = encode(values, block_format, tensor_scale(values, block_format))
    assert 8 * (blocks.nbytes + scales.nbytes) == block_format.bits_per_value * values.numel()


def test_the_table_of_formats_is_keyed_by_name() -> None:
    assert {name: row.name for name, row in FORMATS.items()} == {name: name for name in FORMATS}


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_every_code_decodes_with_every_scale_as_ml_dtypes_does(dtype: torch.dtype) -> None:
    codes = np.tile(np.arange(16, dtype=np.uint8), 2)
    scales = np.arange(256, dtype=np.uint8)
    elements = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    powers = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = elements * powers[:, None]
        if dtype == torch.bfloat16:
            expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
    blocks = np.broadcast_to(codes[0::2] | codes[1::2] << 4, (256, 1, 16)).copy()
    found = decode(torch.from_numpy(blocks), torch.from_numpy(scales).unsqueeze(-1), dtype)
    assert found.shape == (256, 32)
    assert found[255].isnan().all()
    assert not found[:255].isnan().any()
    assert found[254].isinf().sum() == 2 * 2 * 4  # 2, 3, 4 and 6 times 2^127 are out of range
    assert_same_bits(found[:255], torch.from_numpy(expected[:255]).to(dtype))


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_codes_equal_the_cast_in_ml_dtypes(dtype: torch.dtype) -> None:
    values = wide_range((400, 320), torch.float32)
    values[:200] = values[:200].bfloat16()  # few significant bits make many ties
    values = values.to(dtype)
    blocks, scales = encode(values, MXFP4)
    powers = scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    scaled = values.double().unflatten(-1, (-1, 32)).numpy() / powers[..., None]
    assert np.isin(np.abs(scaled), MIDPOINTS).sum() > 200, "too few ties for the test"
    expected = scaled.astype(np.float32).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert np.array_equal(blocks.numpy() & 15, expected[..., 0::2])
    assert np.array_equal(blocks.numpy() >> 4, expected[..., 1::2])


def test_the_scale_of_every_bf16_maximum_is_the_smallest_power_that_holds_it() -> None:
    values = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)  # every finite value from zero upwards
    scales = encode(put_in_blocks(values), MXFP4)[1]
    assert scales.flatten().tolist() == [exact_scale(value) for value in values.tolist()]


def test_the_scale_of_random_fp32_maxima_is_the_smallest_power_that_holds_them() -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randint(0, 0x7F800000, (8000,), generator=generator, dtype=torch.int32).view(torch.float32)
    scales = encode(put_in_blocks(values), MXFP4)[1]
    assert scales.flatten().tolist() == [exact_scale(value) for value in values.tolist()]


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_a_maximum_of_six_scales_fits_and_the_next_float_does_not(dtype: torch.dtype) -> None:
    sixes = torch.tensor([6 * 2.0 ** (byte - 127) for byte in range(LARGEST_SCALE + 1)], dtype=dtype)
    above = (bits(sixes) + 1).view(dtype)
    below = (bits(sixes) - 1).view(dtype)
    expected = list(range(LARGEST_SCALE + 1))
    assert encode(put_in_blocks(sixes), MXFP4)[1].flatten().tolist() == expected
    assert encode(put_in_blocks(below), MXFP4)[1].flatten().tolist() == expected
    larger = [min(byte + 1, LARGEST_SCALE) for byte in expected]
    assert encode(put_in_blocks(above), MXFP4)[1].flatten().tolist() == larger


def test_the_scale_depends_only_on_the_largest_magnitude() -> None:
    values = wide_range((50, 320), torch.float32)
    amax = values.unflatten(-1, (-1, 32)).abs().amax(dim=-1)
    assert encode(values, MXFP4)[1].flatten().tolist() == [exact_scale(value) for value in amax.flatten().tolist()]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_ties_go_to_even(dtype: torch.dtype, sign: int) -> None:
    """Test every midpoint at every scale that a block can have."""
    row = torch.zeros(32)
    row[:8] = torch.tensor([6.0, *MIDPOINTS]) * sign
    powers = torch.tensor(E8M0_VALUES[: LARGEST_SCALE + 1]).unsqueeze(-1)
    blocks, scales = encode((row * powers).to(dtype), MXFP4)
    assert scales.flatten().tolist() == list(range(LARGEST_SCALE + 1))
    codes = torch.tensor([7, *EVEN_CODES]) + (8 if sign < 0 else 0)
    assert torch.equal(unpack_nibbles(blocks)[..., 0, :8], codes.to(torch.uint8).expand(LARGEST_SCALE + 1, -1))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_floats_beside_a_midpoint_go_to_different_codes(sign: int) -> None:
    powers = torch.tensor(E8M0_VALUES[: LARGEST_SCALE + 1]).unsqueeze(-1)
    midpoints = torch.tensor(MIDPOINTS) * powers
    values = torch.zeros(LARGEST_SCALE + 1, 32)
    values[:, 0] = 6 * powers[:, 0]
    values[:, 1:8] = (bits(midpoints) - 1).view(torch.float32)
    values[:, 8:15] = (bits(midpoints) + 1).view(torch.float32)
    blocks, _ = encode(values * sign, MXFP4)
    codes = torch.tensor([7, *range(7), *range(1, 8)]) + (8 if sign < 0 else 0)
    assert torch.equal(unpack_nibbles(blocks)[..., 0, :15], codes.to(torch.uint8).expand(LARGEST_SCALE + 1, -1))


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_the_largest_finite_values_saturate_instead_of_becoming_inf(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = torch.tensor([largest, -largest, largest / 2, largest / 8, 1.0] + [0.0] * 27, dtype=dtype)
    blocks, scales = encode(values, MXFP4)
    assert scales.tolist() == [LARGEST_SCALE]
    assert unpack_nibbles(blocks).flatten().tolist() == [exact_code(value, LARGEST_SCALE) for value in values.tolist()]
    assert decode(blocks, scales, dtype).tolist()[:2] == [3 * 2.0**126, -3 * 2.0**126]


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_values_that_would_round_to_2_to_128_become_the_largest_finite_value(dtype: torch.dtype) -> None:
    limit = bits(torch.tensor([3.5 * 2.0**126], dtype=dtype))
    values = put_in_blocks(torch.cat([limit - 1, limit, limit + 1]).view(dtype))
    assert fake_quantize(values, MXFP4).abs().amax(dim=1).tolist() == [3 * 2.0**126] * 3


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_subnormal_blocks_round_to_nearest_with_the_smallest_scale(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    above = bits(torch.tensor(2.0**-126, dtype=dtype)).item()  # the smallest normal number
    magnitudes = torch.randint(0, int(above), (64, 32), generator=generator, dtype=INTEGERS[dtype]).view(dtype)
    values = torch.where(torch.rand(64, 32, generator=generator) < 0.5, magnitudes, -magnitudes)
    blocks, scales = encode(values, MXFP4)
    assert scales.flatten().tolist() == [0] * 64
    codes = [exact_code(value, 0) for value in values.flatten().tolist()]
    assert unpack_nibbles(blocks).flatten().tolist() == codes
    assert len(set(codes)) == 10, "0, 0.5, 1, 1.5 and 2 of both signs should all occur"


def test_the_smallest_subnormal_becomes_a_zero_with_its_sign() -> None:
    smallest = 2.0**-149
    blocks, scales = encode(torch.tensor([smallest, -smallest] * 16), MXFP4)
    assert (set(blocks.flatten().tolist()), scales.tolist()) == ({0x80}, [0])


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize(("zero", "byte"), [(0.0, 0x00), (-0.0, 0x88)])
def test_zero_blocks_take_the_smallest_scale_and_keep_their_sign(dtype: torch.dtype, zero: float, byte: int) -> None:
    values = torch.full((2, 64), zero, dtype=dtype)
    blocks, scales = encode(values, MXFP4)
    assert (set(blocks.flatten().tolist()), set(scales.flatten().tolist())) == ({byte}, {0})
    assert_same_bits(decode(blocks, scales, dtype), values)


def test_values_that_round_to_zero_keep_their_sign() -> None:
    values = torch.tensor([6.0, 0.2, -0.2, -0.0] + [0.0] * 28)
    found = fake_quantize(values, MXFP4)
    assert_same_bits(found[:4], torch.tensor([6.0, 0.0, -0.0, -0.0]))


@pytest.mark.parametrize("quantizes", [encode, fake_quantize])
@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_nan_and_inf_raise_an_error_that_names_the_first_bad_block(
    bad: float, dtype: torch.dtype, quantizes: object
) -> None:
    values = torch.ones(2, 3, 96, dtype=dtype)
    values[1, 0, 40] = values[1, 2, 0] = values[1, 2, 31] = bad
    with pytest.raises(CodecError, match=r"2 blocks, the first at index \[1, 0, 1\]") as caught:
        quantizes(values, MXFP4)  # type: ignore[operator]
    assert caught.value.block == (1, 0, 1)


@pytest.mark.parametrize("quantizes", [encode, fake_quantize])
@pytest.mark.parametrize("length", [1, 16, 31, 33, 2864])
def test_an_input_dimension_that_is_not_a_multiple_of_the_block_size_is_an_error(
    length: int, quantizes: object
) -> None:
    with pytest.raises(CodecError, match=rf"{length} is not a multiple of the block size 32") as caught:
        quantizes(torch.ones(32, length), MXFP4)  # type: ignore[operator]
    assert caught.value.block is None


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.2, 0.35, 0.16, 0.85, 0.9, 0.67, 0.76], [0.125, 0.25, 0.375, 0.125, 0.75, 1, 0.75, 0.75]),
        ([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], [0, 0, 1, 1, 2, 2, 4, 4]),
        ([0.1, 2, 10, 16, 39, 49.5, 30.5, 98.8], [0, 0, 16, 16, 32, 48, 32, 96]),
        ([2.3, 9, 0.5, 100.5, 900.3, 1e4, 2e3, 3.6e5], [0, 0, 0, 0, 0, 0, 0, 393216]),
    ],
)
def test_golden_rows_of_modelopts_training_kernel_are_reproduced(
    values: list[float], expected: list[float], dtype: torch.dtype
) -> None:
    padding = [0.0] * 24
    found = fake_quantize(torch.tensor(values + padding, dtype=dtype), MXFP4)
    assert_same_bits(found, torch.tensor(expected + padding, dtype=dtype))


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_fake_quantization_is_encode_then_decode(dtype: torch.dtype) -> None:
    values = wide_range((4, 30, 160), dtype)
    assert_same_bits(fake_quantize(values, MXFP4), decode(*encode(values, MXFP4), dtype))


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_fake_quantization_of_its_own_result_changes_nothing(dtype: torch.dtype) -> None:
    once = fake_quantize(wide_range((30, 320), dtype), MXFP4)
    assert_same_bits(fake_quantize(once, MXFP4), once)


def test_fake_quantization_does_not_change_its_input() -> None:
    values = wide_range((30, 320), torch.float32)
    before = values.clone()
    fake_quantize(values, MXFP4)
    encode(values, MXFP4)
    assert_same_bits(values, before)


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_the_gradient_passes_straight_through(dtype: torch.dtype) -> None:
    """The values include zeros of both signs, values far below the scale, and the largest values of the type."""
    values = wide_range((6, 320), dtype)
    values[0] = 0.0
    values[1] = -0.0
    values[2, 1:32] = 1e-30
    values[3] = torch.finfo(dtype).max
    values.requires_grad_()
    gradient = wide_range((6, 320), dtype, seed=4)
    fake_quantize(values, MXFP4).backward(gradient)
    assert_same_bits(values.grad, gradient)


def test_the_gradient_passes_to_earlier_operations() -> None:
    weight = wide_range((4, 32), torch.float32).requires_grad_()
    (fake_quantize(2 * weight, MXFP4) * 3).sum().backward()
    assert_same_bits(weight.grad, torch.full((4, 32), 6.0))


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_every_value_survives_mxfp4_to_plain_to_mxfp4(dtype: torch.dtype) -> None:
    """Bytes may change, but values must not change.

    Test every scale for which BF16 represents all values. Each scale has eight blocks.
    The largest code in block i is i.
    """
    blocks, scales = random_packed(range(LARGEST_SCALE + 1))
    values = decode(blocks, scales, dtype)
    assert_same_bits(decode(*encode(values, MXFP4), dtype), values)


def test_bf16_holds_every_value_of_a_block_exactly() -> None:
    blocks, scales = random_packed(range(LARGEST_SCALE + 1))
    assert_same_bits(decode(blocks, scales, torch.bfloat16).float(), decode(blocks, scales, torch.float32))


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_decoding_equals_transformers_decoding(dtype: torch.dtype) -> None:
    """Test every scale except 255, which transformers reads as 2^128."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_packed(range(255))
    blocks, scales = blocks.unflatten(0, (3, 85)), scales.unflatten(0, (3, 85))  # (E, out, nb, 16), (E, out, nb)
    transposed = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert_same_bits(decode(blocks, scales, dtype), transposed.transpose(1, 2))


def test_decoding_equals_modelopts_decoding() -> None:
    """Test every scale except 255, which ModelOpt reads as 2^128."""
    from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor

    blocks, scales = random_packed(range(255))
    for dtype in TRAINED_TYPES:
        packed = MXFP4QTensor(torch.Size((255, 256)), dtype, blocks.flatten(-2))
        expected = packed.dequantize(dtype=dtype, scale=scales, block_sizes={-1: 32})
        assert_same_bits(decode(blocks, scales, dtype), expected)


def test_the_even_element_lies_in_the_low_nibble() -> None:
    values = torch.tensor([0.5, 1.0, -6.0, 0.0, 0.0, -6.0] + [6.0] * 26)
    assert encode(values, MXFP4)[0].flatten()[:3].tolist() == [0x21, 0x0F, 0xF0]


STRIDED_VIEWS = {
    "transposed": lambda values: values.transpose(1, 2),
    "permuted": lambda values: values.permute(2, 1, 0)[..., :32],
    "every_second": lambda values: values[..., ::2],
    "sliced": lambda values: values[1:, :, 32:96],
    "expanded": lambda values: values[:1].expand(3, -1, -1),
}


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("view", STRIDED_VIEWS.values(), ids=STRIDED_VIEWS)
def test_strided_values_give_the_bits_of_contiguous_ones(view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    strided = view(wide_range((64, 64, 128), dtype))
    assert not strided.is_contiguous()
    assert_same_bytes(encode(strided, MXFP4), encode(strided.contiguous(), MXFP4))
    assert_same_bits(fake_quantize(strided, MXFP4), fake_quantize(strided.contiguous(), MXFP4))


def test_strided_blocks_and_scales_decode_to_the_bits_of_contiguous_ones() -> None:
    blocks, scales = random_packed(range(LARGEST_SCALE + 1))
    turned = blocks.permute(2, 1, 0).contiguous().permute(2, 1, 0), scales.T.contiguous().T
    assert not turned[0].is_contiguous()
    assert not turned[1].is_contiguous()
    assert_same_bits(decode(*turned), decode(blocks, scales))


def test_leading_dimensions_are_kept() -> None:
    for lead in ((), (5,), (2, 3), (2, 1, 3)):
        values = wide_range((*lead, 96), torch.bfloat16)
        blocks, scales = encode(values, MXFP4)
        assert (blocks.shape, scales.shape) == ((*lead, 3, 16), (*lead, 3))
        assert decode(blocks, scales).shape == fake_quantize(values, MXFP4).shape == values.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_types_that_would_be_rounded_twice_or_overflow_are_errors(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        encode(torch.ones(32, dtype=dtype), MXFP4)
