"""The account of rounding separates the kept change from the noise, and counts codes and scales that differ."""

import pytest
import torch

from pipeline.export.account import Account
from pipeline.numerics.codec import decode, encode
from pipeline.numerics.formats import MXFP4


def test_scales_that_grow_and_shrink_are_counted_if_values_differ() -> None:
    account, ones = Account(), torch.ones(1, 32, 4)
    base, rounded = ones.clone(), ones.clone()
    rounded[0, :, 0], rounded[0, :, 1] = 2, 0.5
    old = torch.full((1, 4, 1), 127, dtype=torch.uint8)
    new = torch.tensor([128, 126, 126, 127], dtype=torch.uint8).view(1, 4, 1)
    account.add(
        rounded,
        rounded,
        base=base,
        rounded_base=base,
        scales=((new, None), (old, None)),
        block_format=MXFP4,
        clipped=3,
        adjusted_blocks=0,
    )
    figures = account.figures()
    assert (figures["scales_up"], figures["scales_down"], figures["changed_scales"]) == (0.25, 0.25, 0.5)
    assert (figures["changed_codes"], figures["clipped_values"], figures["kept"]) == (0.5, 3, 1)
    assert figures["noise"] == 0


def test_the_kept_share_and_the_noise_split_the_change_after_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    base, delta, noise = (torch.randn(2, 64, 48, generator=generator) for _ in range(3))
    noise -= (noise * delta).sum() / delta.square().sum() * delta
    scales = torch.full((2, 48, 2), 127, dtype=torch.uint8), None
    account, trained = Account(), base + 0.1 * delta
    account.add(
        trained,
        base + 0.06 * delta + 0.2 * noise,
        base=base,
        rounded_base=base,
        scales=(scales, scales),
        block_format=MXFP4,
        clipped=0,
        adjusted_blocks=0,
    )
    figures = account.figures()
    assert figures["kept"] == pytest.approx(0.6, rel=1e-4)
    assert figures["noise"] == pytest.approx(float(0.2 * noise.norm() / trained.norm()), rel=1e-3)
    assert figures["relative_change"] == pytest.approx(float(0.1 * delta.norm() / base.norm()), rel=1e-4)


def test_untouched_weights_give_the_same_sums_as_the_general_case() -> None:
    """`add` and `add_untouched` agree."""
    packed = encode(torch.randn((3, 48, 64), generator=torch.Generator().manual_seed(0)), MXFP4)
    stack, scales = decode(*packed).transpose(1, 2), packed[1]
    known, counted = Account(), Account()
    for _ in range(2):
        known.add_untouched(stack, scales.numel())
        counted.add(
            stack,
            stack.clone(),
            base=stack.clone(),
            rounded_base=stack.clone(),
            scales=((scales, None), (scales, None)),
            block_format=MXFP4,
            clipped=0,
        )
    assert known.sums == pytest.approx(counted.sums, rel=1e-6)
    assert known.figures() == counted.figures()
    assert known.survival() == counted.survival()
