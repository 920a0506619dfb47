"""Weights are compared with the base model bit by bit."""

import pytest
import torch
from torch import Tensor

from pipeline.numerics.codec import same_bits

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


@pytest.fixture(params=[(3, 48, 64), (3, 5, 7)], ids=["even", "odd"])
def values(request: pytest.FixtureRequest) -> Tensor:
    """BF16 tensors with even and odd sizes, which are compared in words of different widths."""
    made = torch.randn(request.param, generator=torch.Generator().manual_seed(0)).bfloat16()
    made[..., 1::3] = -0.0
    return made


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_equal_bits_are_equal_in_any_memory_order_and_type(dtype: torch.dtype, values: Tensor) -> None:
    turned = values.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (values.clone(), turned):
        assert same_bits(values, other.to(dtype))
        assert same_bits(other.to(dtype), values)
    for part in (slice(1, None), slice(0, 1), slice(0, 0)):
        assert same_bits(values[:, part], turned[:, part])


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("at", [0, 17, -1])
def test_a_single_bit_makes_a_difference(at: int, dtype: torch.dtype, values: Tensor) -> None:
    changed = values.to(dtype, copy=True)
    changed.view(BITS[dtype]).view(-1)[at] ^= 1
    assert not same_bits(changed, values)
    assert not same_bits(values, changed)


def test_the_sign_of_a_zero_and_the_shape_make_a_difference() -> None:
    assert not same_bits(torch.zeros(2, 4), -torch.zeros(2, 4))
    assert not same_bits(torch.zeros(2, 4), torch.zeros(4, 2))
    assert same_bits(torch.full((4,), torch.nan), torch.full((4,), torch.nan))


@pytest.mark.parametrize("offset", range(4))
def test_parts_that_begin_within_a_word_are_compared(offset: int) -> None:
    values = torch.arange(64).bfloat16()
    part = values[offset : offset + 56]
    assert same_bits(part, part.clone())
    changed = part.clone()
    changed[55] = -1
    assert not same_bits(part, changed)
