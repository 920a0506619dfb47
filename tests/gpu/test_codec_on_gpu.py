"""The codec gives the same bits on CPU and GPU, compiled or not. They equal the bits of ModelOpt's training kernel."""

import warnings

import pytest
import torch
from tensor_bits import INTEGERS, bits
from torch import Tensor

from pipeline.numerics.codec import CodecError, decode, encode, fake_quantize, tensor_scale
from pipeline.numerics.compiled import Compilation, can_compile, compilation
from pipeline.numerics.convert import mxfp4_to_nvfp4
from pipeline.numerics.formats import FORMATS, MXFP4, NVFP4, SCALE_RULES, BlockFormat
from pipeline.numerics.packed_rounding import round_packed
from pipeline.numerics.stochastic import Noise, round_to_scales

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RULES = {f"{name}-{rule}": row.with_rule(rule) for name, row in FORMATS.items() for rule in SCALE_RULES[row.scale_type]}
TRAINED_TYPES = (torch.bfloat16, torch.float32)
ORDERS = {
    "in_last": lambda values: values,
    "in_first": lambda values: values.transpose(-2, -1).contiguous().transpose(-2, -1),
}
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def to_gpu(values: Tensor) -> Tensor:
    """Copy values to the GPU with unchanged strides."""
    return torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="cuda").copy_(values)


def whole_range(dtype: torch.dtype) -> Tensor:
    """Make values (2, 1037, 192). In both matrices, the values range from subnormals to 2^126.

    Every other row has few significant bits, so that many values are ties.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 1037, 192, generator=generator).clamp(-1, 1)
    values[:, ::2] = (values[:, ::2] * 16).round() / 16
    values[..., 5], values[..., 70] = 0.0, -0.0
    return (values * torch.linspace(-149, 126, 1037)[:, None].exp2()).to(dtype)


def of_one_size(dtype: torch.dtype) -> Tensor:
    """Make values of shape (3, 517, 192). As in real weights, the range of e4m3 holds all scales of a matrix."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(-12, 1, (3, 517, 12), generator=generator).float().exp2().repeat_interleave(16, dim=-1)
    return (torch.randn(3, 517, 192, generator=generator) * sizes).to(dtype)


def everything(values: Tensor, block_format: BlockFormat, importance: Tensor) -> list[Tensor]:
    """Compute all results of the codec for some values."""
    unit = tensor_scale(values, block_format)
    blocks, scales = encode(values, block_format, unit)
    decoded = [decode(blocks, scales, values.dtype, unit, out=into) for into in (None, torch.empty_like(values))]
    rounded = [fake_quantize(values, block_format, None, weights) for weights in (None, importance)]
    units = [] if unit is None else [unit]
    return [*units, blocks, scales, *encode(values, block_format, unit, importance), *decoded, *rounded]


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("block_format", RULES.values(), ids=RULES)
def test_a_gpu_gives_the_bits_of_a_cpu(
    block_format: BlockFormat, dtype: torch.dtype, order: str, is_compiled: bool
) -> None:
    """Compare with the result of eager kernels on the CPU. Fail if a compiled kernel silently falls back to eager."""
    if is_compiled and not can_compile("cuda"):
        pytest.skip("no Triton on this machine")
    mode = Compilation.always if is_compiled else Compilation.never
    importance = torch.rand(192, generator=torch.Generator().manual_seed(2)) ** 4
    for sample in (whole_range(dtype), of_one_size(dtype)):
        values = ORDERS[order](sample)
        with compilation(Compilation.never):
            on_cpu = everything(values, block_format, importance)
        with (
            compilation(mode),
            torch._dynamo.config.patch(recompile_limit=100, fail_on_recompile_limit_hit=True),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("error", message="torch.compile failed")
            on_gpu = everything(to_gpu(values), block_format, importance.cuda())
        for one, other in zip(on_gpu, on_cpu, strict=True):
            assert one.is_cuda
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("block_format", [MXFP4, NVFP4], ids=lambda row: row.name)
def test_nan_and_inf_set_the_flag_or_raise_an_error_that_names_the_block(
    block_format: BlockFormat, bad: float, is_compiled: bool
) -> None:
    values = ORDERS["in_first"](torch.randn(3, 64, 96)).cuda()
    is_bad = torch.zeros((), dtype=torch.bool, device="cuda")
    with compilation(Compilation.always if is_compiled else Compilation.never):
        fake_quantize(values, block_format, is_bad=is_bad)
        assert not is_bad
        values[1, 40, 70] = bad
        fake_quantize(values, block_format, is_bad=is_bad)
        assert is_bad
        with pytest.raises(CodecError) as caught:
            fake_quantize(values, block_format)
        assert caught.value.block == (1, 40, 70 // block_format.block_size)
        values[1, 40, 70] = 0.0
        fake_quantize(values, block_format, is_bad=is_bad)
        assert is_bad, "a flag stays set"


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("block_format", RULES.values(), ids=RULES)
def test_float32_weights_are_rounded_to_bfloat16_with_the_bits_of_two_steps(
    block_format: BlockFormat, is_compiled: bool
) -> None:
    values = to_gpu(ORDERS["in_first"](of_one_size(torch.float32)))
    with compilation(Compilation.always if is_compiled else Compilation.never):
        at_once = fake_quantize(values, block_format, dtype=torch.bfloat16)
        in_two = fake_quantize(values, block_format).bfloat16()
    assert torch.equal(bits(at_once), bits(in_two))


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_a_gpu_decodes_every_code_and_scale_of_mxfp4_as_a_cpu_does(dtype: torch.dtype) -> None:
    """The results include NaN, and Inf for values beyond the range of the type."""
    codes = torch.arange(16, dtype=torch.uint8)
    blocks = (codes[0::2] | codes[1::2] << 4).repeat(2).expand(256, 1, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).unsqueeze(-1)
    on_cpu, on_gpu = decode(blocks, scales, dtype), decode(blocks.cuda(), scales.cuda(), dtype)
    assert torch.equal(bits(on_gpu[:255]), bits(on_cpu[:255]))
    assert bool(on_gpu[255].isnan().all())


def test_a_gpu_converts_mxfp4_to_the_nvfp4_of_a_cpu() -> None:
    """Some blocks have scales outside of e4m3's range.

    The codec rounds such a block. If a value changes, the block is counted.
    """
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (2, 60, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(90, 120, (2, 60, 4), generator=generator, dtype=torch.uint8)
    on_cpu, on_gpu = mxfp4_to_nvfp4(blocks, scales), mxfp4_to_nvfp4(blocks.cuda(), scales.cuda())
    assert on_gpu.changed_blocks == on_cpu.changed_blocks > 0
    for one, other in zip(on_gpu[:3], on_cpu[:3], strict=True):
        assert torch.equal(bits(one), bits(other))


def assert_same_as_modelopt(values: Tensor) -> None:
    """Compare all bits. But if the input is zero, the sign of the result may differ.

    ModelOpt's kernel (tensor_quant_mx.cu) leaves this sign undefined.
    """
    from modelopt.torch.quantization.tensor_quant import dynamic_block_quant

    theirs = dynamic_block_quant(values, MXFP4.block_size, None, None, (2, 1), (8, 0))  # TensorQuantizer's arguments
    ours = fake_quantize(values, MXFP4)
    assert (theirs.dtype, theirs.shape) == (ours.dtype, ours.shape)
    is_zero = values == 0
    assert bool((theirs[is_zero] == 0).all())
    assert torch.equal(bits(theirs[~is_zero]), bits(ours[~is_zero]))


@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
def test_random_weights_are_rounded_as_modelopts_kernel_does(dtype: torch.dtype) -> None:
    """Compare blocks whose scales are normal floats. ModelOpt's kernel uses fast math, which treats subnormals as zero.

    Fast math also makes the kernel's quotient amax / 6 approximate. If a block's maximum is almost, but not exactly,
    six times a power of two, the kernel may choose the neighbouring scale. The test sets such blocks to zero. In BF16
    there are no such blocks.
    """
    generator = torch.Generator().manual_seed(4)
    sizes = torch.randint(-90, 91, (2000, 90, 1), generator=generator).float().exp2()
    values = (torch.randn(2000, 90, 32, generator=generator) * sizes).to(dtype)
    quotient = torch.frexp(values.double().abs().amax(dim=-1) / 6).mantissa  # in [0.5, 1)
    is_close = (quotient > 1 - 2.0**-20) | ((quotient > 0.5) & (quotient < 0.5 + 2.0**-20))
    assert dtype == torch.float32 or not is_close.any()
    values[is_close] = 0.0
    assert_same_as_modelopt(values.flatten(1).cuda())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("largest", [3.5, 4.0, 5.5, 6.0], ids="largest_is_{}".format)
def test_ties_are_rounded_as_modelopts_kernel_does(largest: float, dtype: torch.dtype, sign: int) -> None:
    """Test every midpoint at every scale from 2^-100 to 2^100, and the floats next to each midpoint.

    `largest` is the maximum of each block, as a multiple of the block's scale.
    """
    powers = torch.arange(-100.0, 101.0).exp2().unsqueeze(-1)
    midpoints = (torch.tensor([m for m in MIDPOINTS if m < largest]) * powers).to(dtype)
    kind = INTEGERS[dtype]
    beside = [(midpoints.view(kind) + step).view(dtype) for step in (-1, 0, 1)]
    values = torch.zeros(len(powers), 32, dtype=dtype)
    values[:, :1] = (largest * powers).to(dtype)
    row = torch.cat(beside, dim=-1)
    values[:, 1 : 1 + row.shape[1]] = row
    assert_same_as_modelopt((sign * values).cuda())


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("block_format", RULES.values(), ids=RULES)
def test_packed_weights_are_decoded_and_rounded_with_the_bits_of_a_cpu(
    block_format: BlockFormat, is_compiled: bool
) -> None:
    if is_compiled and not can_compile("cuda"):
        pytest.skip("no Triton on this machine")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 517, 6, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(90, 140, blocks.shape[:3], dtype=torch.uint8, generator=generator)
    a, b = (0.01 * torch.randn(3, *shape, generator=generator) for shape in ((192, 8), (8, 517)))
    with compilation(Compilation.never):
        expected = round_packed((blocks, scales), (a, b, 2.0), block_format, dtype=torch.bfloat16)
    with compilation(Compilation.always if is_compiled else Compilation.never):
        on_gpu = blocks.cuda(), scales.cuda()
        found = round_packed(on_gpu, (a.cuda(), b.cuda(), 2.0), block_format, dtype=torch.bfloat16)
        decoded = decode(*on_gpu)
    assert torch.equal(bits(found), bits(expected))
    assert torch.equal(bits(decoded), bits(decode(blocks, scales)))


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", TRAINED_TYPES, ids=str)
@pytest.mark.parametrize("block_format", [MXFP4, NVFP4], ids=lambda row: row.name)
def test_stochastic_rounding_on_a_gpu_gives_the_bits_of_a_cpu(
    block_format: BlockFormat, dtype: torch.dtype, order: str, is_compiled: bool
) -> None:
    if is_compiled and not can_compile("cuda"):
        pytest.skip("no Triton on this machine")
    noise = Noise.of(42, "model.layers.0.mlp.experts.gate_up_proj")
    for sample in (whole_range(dtype), of_one_size(dtype)):
        values = ORDERS[order](sample)
        unit = tensor_scale(values, block_format)
        with compilation(Compilation.never):
            _, scales = encode(values, block_format, unit)
            expected = round_to_scales(values, block_format, scales, unit, noise=noise, first=5)
        with compilation(Compilation.always if is_compiled else Compilation.never):
            on_gpu = None if unit is None else unit.cuda()
            found = round_to_scales(to_gpu(values), block_format, scales.cuda(), on_gpu, noise=noise, first=5)
        assert found.values.is_cuda and found.clipped == expected.clipped
        assert torch.equal(bits(found.values), bits(expected.values))
        assert torch.equal(bits(found.blocks), bits(expected.blocks))
