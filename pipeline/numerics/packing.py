"""4-bit codes <-> bytes: the even element of a pair lies in the low nibble (gpt-oss' Hugging Face layout)."""

from torch import Tensor, stack, uint8


def pack_nibbles(codes: Tensor) -> Tensor:
    """(..., 2n) uint8 codes below 16 -> (..., n) uint8 bytes."""
    pairs = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """(..., n) uint8 bytes -> (..., 2n) uint8 codes below 16."""
    if packed.dtype != uint8:
        raise TypeError(f"packed codes must be uint8, not {packed.dtype}")
    return stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)
