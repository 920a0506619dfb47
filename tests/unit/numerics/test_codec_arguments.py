"""The codec with empty tensors, and with arguments that do not match."""

import pytest
import torch

from pipeline.numerics.codec import CodecError, decode, encode, fake_quantize, tensor_scale
from pipeline.numerics.comparison import unequal_blocks
from pipeline.numerics.formats import FORMATS, MXFP4, NVFP4, BlockFormat

EVERY_FORMAT = pytest.mark.parametrize("block_format", FORMATS.values(), ids=lambda each: each.name)


@EVERY_FORMAT
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0, 3, 64), (3, 0)], ids=str)
def test_empty_tensors_give_empty_tensors(block_format: BlockFormat, shape: tuple[int, ...]) -> None:
    values = torch.empty(shape, dtype=torch.bfloat16)
    unit = tensor_scale(values, block_format)
    per_row = shape[-1] // block_format.block_size
    saturated = torch.empty((*shape[:-1], per_row), dtype=torch.bool)
    blocks, scales = encode(values, block_format, unit, saturated=saturated)
    assert blocks.shape == (*shape[:-1], per_row, block_format.block_size // 2)
    assert scales.shape == (*shape[:-1], per_row)
    assert decode(blocks, scales, tensor_scale=unit).shape == shape
    assert fake_quantize(values, block_format).shape == shape
    stack = (values if values.ndim == 3 else values.unsqueeze(0)).mT
    assert unequal_blocks(stack, stack, block_format).shape == (len(stack), *scales.shape[-2:])


def test_an_empty_input_passes_an_empty_gradient() -> None:
    inputs = torch.empty(0, 64, requires_grad=True)
    fake_quantize(inputs, MXFP4).sum().backward()
    assert inputs.grad is not None and inputs.grad.shape == (0, 64)


def test_e8m0_scales_decode_only_without_a_tensor_scale() -> None:
    blocks, scales = encode(torch.ones(2, 32), MXFP4)
    with pytest.raises(TypeError, match="uint8 scales have no tensor scale"):
        decode(blocks, scales, tensor_scale=torch.ones(()))


def test_e4m3_scales_decode_only_with_a_tensor_scale() -> None:
    values = torch.ones(2, 32)
    blocks, scales = encode(values, NVFP4, tensor_scale(values, NVFP4))
    with pytest.raises(TypeError, match="need a tensor scale"):
        decode(blocks, scales)


def test_decoding_writes_to_an_output_with_any_strides() -> None:
    values = torch.randn(3, 5, 64)
    blocks, scales = encode(values, MXFP4)
    into = torch.zeros(3, 64, 5, dtype=torch.bfloat16)
    decoded = decode(blocks, scales, out=into.transpose(1, 2))
    assert decoded.data_ptr() == into.data_ptr()
    assert torch.equal(into.transpose(1, 2), decode(blocks, scales))


@pytest.mark.parametrize("given", [torch.full((64,), -1.0), torch.full((64,), torch.nan)], ids=["negative", "nan"])
def test_negative_importance_and_nan_are_errors(given: torch.Tensor) -> None:
    with pytest.raises(CodecError, match="importance must be a non-negative number"):
        encode(torch.randn(2, 64), MXFP4.with_rule("mse"), importance=given)


def test_values_beyond_a_given_tensor_scale_saturate_with_their_sign() -> None:
    values = torch.tensor([[1.0, -1.0, 3.0e4, -3.0e38] * 8])
    unit = torch.tensor(2.0**-10)
    largest = 6 * 448 * unit
    rounded = fake_quantize(values, NVFP4, unit)
    assert rounded[0, 2:4].tolist() == [float(largest), -float(largest)]
    assert bool(rounded.isfinite().all())
    saturated = torch.zeros((1, 2), dtype=torch.bool)
    encode(values, NVFP4, unit, saturated=saturated)
    assert bool(saturated.all())


def test_unequal_blocks_ignore_the_sign_of_a_zero() -> None:
    one = torch.zeros(1, 96, 2)
    other = one.clone()
    other[0, 5, 0], other[0, 40, 1] = -0.0, 1.0
    assert unequal_blocks(one, other, MXFP4).tolist() == [[[False] * 3, [False, True, False]]]
