"""On a GPU, one function decodes a packed stack, and another function rounds base + delta.

They give the same bits as separate steps.

Here the functions run eagerly on a CPU. test_compiled_codec.py compiles them for a CPU. test_kernels_for_gpus.py
compiles them for GPUs, on a machine without a GPU.
"""

from typing import Any

import pytest
import torch
from tensor_bits import bits
from torch import Tensor

from pipeline.numerics import slabs, stacks
from pipeline.numerics.codec import CodecError, decode, encode, tensor_scale
from pipeline.numerics.formats import FORMATS, MXFP4, SCALE_RULES, BlockFormat
from pipeline.numerics.packed_rounding import round_packed

RULES = {f"{name}-{rule}": row.with_rule(rule) for name, row in FORMATS.items() for rule in SCALE_RULES[row.scale_type]}
EXPERTS, OUT, IN, RANK = 3, 40, 96, 4


def packed(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make random blocks with scales from 2^-20 to 2^4."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (EXPERTS, OUT, IN // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(107, 131, (EXPERTS, OUT, IN // 32), dtype=torch.uint8, generator=generator)
    return blocks, scales


def factors(size: float = 0.01) -> tuple[Tensor, Tensor, float]:
    """Make random factors of an adapter. Their delta is about as large as the weights in blocks with small scales."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(EXPERTS, IN, RANK, generator=generator), torch.randn(EXPERTS, RANK, OUT, generator=generator)
    return size * a, size * b, 1.5


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the codec work as on a GPU with a compiler. The returned list collects the functions that it calls."""
    names: list[str] = []

    def watch(function: Any) -> None:
        def run(*arguments: Tensor) -> Tensor:
            names.append(function.__name__)
            return function(*arguments)

        monkeypatch.setattr(function, "run_compiled", run)

    for each in (stacks.decode_stack, stacks.merged_amax):
        watch(each)
    monkeypatch.setattr(slabs, "ONLY_SLABS", frozenset())
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_stack_is_decoded_whole_with_the_bits_and_the_order_of_slabs(
    name: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    values = torch.randn(EXPERTS, OUT, IN, generator=torch.Generator().manual_seed(0))
    values[0, :3] = torch.tensor([0.0, -0.0, 1e-38]).unsqueeze(1)
    unit = tensor_scale(values, FORMATS[name])
    blocks, scales = encode(values, FORMATS[name], unit)
    expected = decode(blocks, scales, dtype, unit)
    calls = request.getfixturevalue("calls")
    assert torch.equal(bits(decode(blocks, scales, dtype, unit)), bits(expected))
    into = torch.empty(EXPERTS, IN, OUT, dtype=dtype)
    assert decode(blocks, scales, dtype, unit, out=into.transpose(1, 2)).stride() == (IN * OUT, 1, OUT)
    assert torch.equal(bits(into.transpose(1, 2)), bits(expected))
    assert calls == ["decode_stack"] * 2


def test_a_scale_byte_of_255_is_nan_in_a_stack_that_is_decoded_whole(calls: list[str]) -> None:
    blocks, scales = packed()
    scales[1, 2, 0] = 255
    found = decode(blocks, scales)
    assert found.isnan().sum() == 32
    assert found[1, 2, :32].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_format", RULES.values(), ids=RULES)
def test_base_plus_delta_is_rounded_whole_with_the_bits_of_separate_steps(
    block_format: BlockFormat, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    expected = round_packed(packed(), factors(), block_format, dtype=dtype)
    assert not torch.equal(expected, decode(*packed(), dtype).transpose(1, 2))
    calls = request.getfixturevalue("calls")
    found = round_packed(packed(), factors(), block_format, dtype=dtype)
    assert calls == ([] if block_format.scale_rule == "mse" else ["merged_amax"]) or calls == ["decode_stack"]
    assert (found.dtype, found.shape) == (dtype, (EXPERTS, IN, OUT))
    assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "steps"])
def test_a_delta_that_is_not_finite_sets_the_flag_or_raises_an_error(
    is_whole: bool, request: pytest.FixtureRequest
) -> None:
    if is_whole:
        request.getfixturevalue("calls")
    is_bad = torch.tensor(False)
    a, b, scaling = factors()
    round_packed(packed(), (a, b, scaling), MXFP4, dtype=torch.float32, is_bad=is_bad)
    assert not is_bad
    a[2, 70] = float("inf")
    with pytest.raises(CodecError) as caught:
        round_packed(packed(), (a, b, scaling), MXFP4, dtype=torch.float32)
    assert caught.value.block == (2, 0, 2)
    round_packed(packed(), (a, b, scaling), MXFP4, dtype=torch.float32, is_bad=is_bad)
    assert is_bad


def test_encoding_with_a_flag_raises_no_error() -> None:
    values, is_bad = torch.ones(2, 4, 64), torch.tensor(False)
    encode(values, MXFP4, is_bad=is_bad)
    assert not is_bad
    values[1, 2, 3] = float("nan")
    encode(values, MXFP4, is_bad=is_bad)
    assert is_bad
