"""The bits of tensors, and the values of all codes of the number formats."""

import math

import torch
from torch import Tensor

from pipeline.numerics.formats import E2M1_MAGNITUDES, E8M0_BIAS

E2M1_VALUES = E2M1_MAGNITUDES + tuple(-magnitude for magnitude in E2M1_MAGNITUDES)
"""Value of each 4-bit code of e2m1."""

E8M0_VALUES = (*(math.ldexp(1.0, byte - E8M0_BIAS) for byte in range(255)), math.nan)
"""Value of each scale byte: 2^(byte - 127). Byte 255 is NaN."""

INTEGERS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
    torch.uint8: torch.uint8,
}
"""Type of the values -> type of the whole numbers with the same bits."""


def bits(values: Tensor) -> Tensor:
    """Return the bits as whole numbers on the CPU. So zeros of both signs differ, and NaN equals itself."""
    return values.cpu().contiguous().view(INTEGERS[values.dtype])


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(bits(found), bits(expected))


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)
