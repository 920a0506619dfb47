"""The delta of an adapter always has the same bits, one expert at a time or all at once."""

import pytest
import torch
from torch import Tensor

from pipeline.numerics import low_rank

EXPERTS, WIDTH, OUT, RANK, SCALING = 3, 64, 96, 8, 1.7


def factors(rank: int = RANK) -> tuple[Tensor, Tensor, Tensor]:
    """Return a base (E, in, out) bfloat16, A (E, in, r) and B (E, r, out), with the strides of PEFT's matrices."""
    generator = torch.Generator().manual_seed(rank)
    base = torch.randn(EXPERTS, WIDTH, OUT, generator=generator).bfloat16()
    a = torch.randn(EXPERTS, rank, WIDTH, generator=generator).transpose(1, 2)
    b = torch.randn(OUT, rank, EXPERTS, generator=generator).permute(2, 1, 0)
    return base, a, b


def summed_in_order(a: Tensor, b: Tensor) -> Tensor:
    """Sum a[:, k] b[k] over k, in order. Each operation is computed in float64 and rounded to float32."""
    total = torch.zeros(EXPERTS, WIDTH, OUT, dtype=torch.float32)
    for k in range(a.shape[2]):
        product = (a[:, :, k, None].double() * b[:, k, None, :].double()).float()
        total = product if k == 0 else (total.double() + product.double()).float()
    return total


@pytest.mark.parametrize("rank", [1, 8, 24])
def test_products_and_sums_are_rounded_in_the_order_of_the_rank(rank: int) -> None:
    base, a, b = factors(rank)
    assert torch.equal(low_rank.delta(base.float(), a, b, 1.0), summed_in_order(a, b))
    expected = base + (summed_in_order(a, b) * SCALING).bfloat16()
    assert torch.equal(low_rank.merge(base, a, b, SCALING), expected)


def test_one_expert_at_a_time_gives_the_same_bits_as_all() -> None:
    base, a, b = factors()
    whole = low_rank.merge(base, a, b, SCALING)
    parts = [low_rank.merge(base[i : i + 1], a[i : i + 1], b[i : i + 1], SCALING) for i in range(EXPERTS)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("at_once", [1, 1 << 27], ids=["one expert at a time", "all at once"])
def test_gradients_are_those_of_the_matrix_product(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_VALUES_AT_ONCE", at_once)
    base, a, b = factors()
    found, expected = [[each.clone().requires_grad_() for each in (a, b)] for _ in range(2)]
    weights = torch.randn(EXPERTS, WIDTH, OUT, generator=torch.Generator().manual_seed(0))
    (low_rank.delta(base.float(), *found, SCALING) * weights).sum().backward()
    (found_product := (expected[0] @ expected[1]) * SCALING * weights).sum().backward()
    assert found_product.requires_grad
    for one, other in zip(found, expected, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-4)


def test_autocast_does_not_change_the_delta() -> None:
    base, a, b = factors()
    expected = low_rank.delta(base, a, b, SCALING)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low_rank.delta(base, a, b, SCALING), expected)
