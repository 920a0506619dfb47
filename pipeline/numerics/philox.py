"""Makes random bits with Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

The generator has no state. It is a function of a key and a counter, so the bits of a number depend only on its place,
and neither on the device nor on the order of the work. Only integer operations are used. No product or sum exceeds 63
bits, because compilers may treat an overflow of signed numbers as an error.

Words have 32 bits and are held in int64.
"""

from torch import Tensor

_ROUNDS = 10
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_HALF = 0xFFFF

Counter = tuple[Tensor, Tensor, Tensor, Tensor]
"""Four words. They may have any shapes that broadcast."""


def philox(counter: Counter, key: tuple[Tensor, Tensor]) -> Counter:
    """Return four random words for each counter.

    Args:
        counter: four int64 tensors with words.
        key: two int64 tensors with words.
    """
    a, b, c, d = counter
    key_a, key_b = key
    for i in range(_ROUNDS):
        high_a, low_a = _multiply(a, _FACTORS[0])
        high_c, low_c = _multiply(c, _FACTORS[1])
        steps = [(i * step) & _WORD for step in _KEY_STEPS]
        a, c = high_c ^ b ^ ((key_a + steps[0]) & _WORD), high_a ^ d ^ ((key_b + steps[1]) & _WORD)
        b, d = low_c, low_a
    return (a, b, c, d)


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower word of a product of two words."""
    below, above = word * (factor & _HALF), word * (factor >> 16)
    high = (above + (below >> 16)) >> 16
    return high, (below + ((above & _HALF) << 16)) & _WORD
