"""Blocks are counted by the largest magnitude of their codes, and the sign of a code is ignored."""

import pytest
import torch

from pipeline.numerics.codec import decode
from pipeline.numerics.compiled import Compilation, compilation
from pipeline.numerics.largest_codes import MAGNITUDES, count_largest


@pytest.mark.parametrize("mode", [Compilation.never, Compilation.always])
@pytest.mark.parametrize("half", [8, 16])
def test_the_counts_are_those_of_the_decoded_values(half: int, mode: Compilation) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 40, 6, half), dtype=torch.uint8, generator=generator)
    for i, mask in enumerate((0x88, 0x99, 0xAA, 0xBB, 0xCC, 0xDD)):  # limits the largest code of some blocks
        blocks[:, 5 * i : 5 * i + 5] &= mask
    scales = torch.full(blocks.shape[:-1], 127, dtype=torch.uint8)
    largest = decode(blocks, scales, torch.float32).unflatten(-1, (-1, 2 * half)).abs().amax(-1)
    with compilation(mode):
        found = count_largest(blocks)
    assert found.tolist() == [int((largest == size).sum()) for size in MAGNITUDES]
    assert min(found.tolist()) > 0 and int(found.sum()) == scales.numel()


def test_every_code_is_found_in_every_place_of_a_block() -> None:
    for code in range(8):
        for byte in range(16):
            for shift in (0, 4):
                for sign in (0, 8):
                    blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
                    blocks[..., byte] = (code | sign) << shift
                    assert count_largest(blocks).tolist() == [int(each == code) for each in range(8)]


def test_parts_of_a_stack_are_counted_alone() -> None:
    blocks = torch.randint(0, 256, (4, 3, 2, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    parts = sum(count_largest(part) for part in (blocks[:1], blocks[1:, :, :1], blocks[1:, :, 1:]))
    assert torch.equal(parts, count_largest(blocks))
