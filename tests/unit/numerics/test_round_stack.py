"""`round_stack` rounds a whole stack at once, as on a GPU. The codec rounds slab by slab, and gives the same bits.

Here the function runs eagerly on a CPU. test_compiled_codec.py compiles it for a CPU. test_kernels_for_gpus.py compiles
it for GPUs, on a machine without a GPU.
"""

from collections.abc import Callable

import pytest
import torch
from tensor_bits import bits
from torch import Tensor

from pipeline.numerics import slabs
from pipeline.numerics.codec import CodecError, fake_quantize, tensor_scale
from pipeline.numerics.formats import FORMATS, MXFP4, NVFP4, SCALE_RULES, BlockFormat
from pipeline.numerics.stacks import round_stack

RULES = {f"{name}-{rule}": row.with_rule(rule) for name, row in FORMATS.items() for rule in SCALE_RULES[row.scale_type]}
SHAPE = (3, 40, 96)  # experts, out, in
ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "in_last": lambda values: values,
    "in_first": lambda values: values.transpose(1, 2).contiguous().transpose(1, 2),
}


def sample(dtype: torch.dtype) -> Tensor:
    """Make weights of many magnitudes, down to subnormals. Every other row has many ties."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(SHAPE, generator=generator)
    values[:, ::2] = (values[:, ::2] * 16).round() / 4
    sizes = torch.randint(-130, 100, (*SHAPE[:2], SHAPE[2] // 16), generator=generator).double().exp2()
    values = (values.double() * sizes.repeat_interleave(16, dim=-1)).to(dtype)
    values[..., 5], values[..., 70] = 0.0, -0.0
    return values


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Let the codec work as on a GPU with a compiler. The returned list collects the inputs of `round_stack`."""
    whole: list[Tensor] = []

    def run(view: Tensor, *others: object) -> object:
        whole.append(view)
        return round_stack(view, *others)

    monkeypatch.setattr(round_stack, "run_compiled", run)
    monkeypatch.setattr(slabs, "ONLY_SLABS", frozenset())
    return whole


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_format", RULES.values(), ids=RULES)
def test_a_whole_stack_has_the_bits_and_the_memory_order_of_slabs(
    block_format: BlockFormat, dtype: torch.dtype, order: str, request: pytest.FixtureRequest
) -> None:
    values = ORDERS[order](sample(dtype))
    importance = torch.rand(SHAPE[-1], generator=torch.Generator().manual_seed(1)) ** 4
    unit = tensor_scale(values, block_format)
    cases = [(None, None), (unit, None), (None, importance)]
    expected = [fake_quantize(values, block_format, *case) for case in cases]
    whole = request.getfixturevalue("as_on_a_gpu")
    found = [fake_quantize(values, block_format, *case) for case in cases]
    assert len(whole) == len(cases)
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("shape", [(96,), (7, 96), (2, 3, 5, 96), (0, 96)], ids=str)
def test_values_of_any_shape_can_be_rounded_whole(shape: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = fake_quantize(values, MXFP4)
    request.getfixturevalue("as_on_a_gpu")
    assert torch.equal(fake_quantize(values, MXFP4), expected)


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "slabs"])
@pytest.mark.parametrize("block_format", RULES.values(), ids=RULES)
def test_the_result_can_have_another_type_with_the_bits_of_two_steps(
    block_format: BlockFormat, is_whole: bool, request: pytest.FixtureRequest
) -> None:
    values = ORDERS["in_first"](sample(torch.float32))
    expected = fake_quantize(values, block_format).bfloat16()
    if is_whole:
        request.getfixturevalue("as_on_a_gpu")
    found = fake_quantize(values, block_format, dtype=torch.bfloat16)
    assert (found.dtype, found.stride()) == (torch.bfloat16, values.stride())
    assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "slabs"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("block_format", [MXFP4, MXFP4.with_rule("mse"), NVFP4], ids=str)
def test_nan_and_inf_set_the_flag_or_raise_an_error_that_names_the_block(
    block_format: BlockFormat, bad: float, is_whole: bool, request: pytest.FixtureRequest
) -> None:
    if is_whole:
        request.getfixturevalue("as_on_a_gpu")
    values, is_bad = ORDERS["in_first"](sample(torch.float32)), torch.tensor(False)
    fake_quantize(values, block_format, is_bad=is_bad)
    assert not is_bad
    values[1, 30, 70] = bad
    with pytest.raises(CodecError) as caught:
        fake_quantize(values, block_format)
    assert caught.value.block == (1, 30, 70 // block_format.block_size)
    fake_quantize(values, block_format, is_bad=is_bad)
    assert is_bad
    values[1, 30, 70] = 0.0
    fake_quantize(values, block_format, is_bad=is_bad)
    assert is_bad, "a flag stays set"


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_bad_importance_sets_the_flag(bad: float) -> None:
    importance, is_bad = torch.ones(SHAPE[-1]), torch.tensor(False)
    importance[3] = bad
    fake_quantize(sample(torch.float32), MXFP4.with_rule("mse"), None, importance, is_bad=is_bad)
    assert is_bad
