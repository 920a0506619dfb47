"""Weights that are still the base model's: found to the bit, and accounted for as any others are."""

from collections.abc import Iterator
from itertools import count

import pytest
import torch
from torch import Tensor

from pipeline.export.survival import Survival
from pipeline.numerics import codec, kernels
from pipeline.numerics.codec import decode, decodes_to, encode
from pipeline.numerics.formats import MXFP4

E, IN, OUT = 3, 64, 48
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


@pytest.fixture
def packed() -> tuple[Tensor, Tensor]:
    values = torch.randn((E, OUT, IN), generator=torch.Generator().manual_seed(0))
    values[1, 7, :40] = -0.0
    return encode(values, MXFP4)


@pytest.fixture(params=["row by row", "column by column"])
def weights(request: pytest.FixtureRequest, packed: tuple[Tensor, Tensor]) -> Tensor:
    """(E, out, in) of both memory orders, in BF16."""
    values = decode(*packed)
    return values if request.param == "row by row" else values.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.fixture(params=[1 << 22, 96], ids=["one slab", "many slabs"], autouse=True)
def _slabs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(codec._SLAB_VALUES, "cpu", request.param)


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_what_blocks_decode_to_is_recognized(
    dtype: torch.dtype, weights: Tensor, packed: tuple[Tensor, Tensor]
) -> None:
    assert decodes_to(weights.to(dtype), *packed)


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("at", [(0, 0, 0), (1, 20, 33), (E - 1, OUT - 1, IN - 1)])
def test_a_single_bit_makes_a_difference(
    at: tuple[int, ...], dtype: torch.dtype, weights: Tensor, packed: tuple[Tensor, Tensor]
) -> None:
    changed = weights.to(dtype)
    changed.view(BITS[dtype])[at] ^= 1
    assert not decodes_to(changed, *packed)


def test_so_does_the_sign_of_a_zero(weights: Tensor, packed: tuple[Tensor, Tensor]) -> None:
    assert weights[1, 7, 3] == 0
    weights[1, 7, 3] = 0.0
    assert not decodes_to(weights, *packed)


def test_nothing_is_decoded_beyond_the_first_difference(
    weights: Tensor, packed: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Iterator[int] = count()
    unpacked = kernels.unpacked
    monkeypatch.setattr(kernels, "unpacked", lambda *arguments: (next(calls), unpacked(*arguments))[1])
    weights[0, 0, 0] += 1
    assert not decodes_to(weights, *packed)
    assert next(calls) == 1


def test_untouched_weights_count_as_any_others_do(weights: Tensor, packed: tuple[Tensor, Tensor]) -> None:
    """By way of the account of weights that may have changed."""
    stack, scales = weights.transpose(1, 2), packed[1]
    known, counted = Survival(), Survival()
    for _ in range(2):
        known.add_untouched(stack, scales.numel())
        counted.add(stack, stack.clone(), stack.clone(), stack.clone(), (scales, scales), MXFP4)
    assert known.sums == pytest.approx(counted.sums, rel=1e-6)
    assert known.figures() == counted.figures()
