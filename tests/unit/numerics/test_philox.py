"""Philox4x32-10 gives the published bits."""

import numpy as np
import pytest
import torch

from pipeline.numerics.philox import philox

WORD = 0xFFFFFFFF
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
"""Counter, key and result: the test vectors of Random123 1.14 (kat_vectors) for philox4x32 with 10 rounds."""


def tensors(words: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(word, dtype=torch.int64) for word in words)


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_the_bits_are_those_of_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    found = philox(tensors(counter), tensors(key))  # type: ignore[arg-type]
    assert tuple(int(word) for word in found) == expected


def test_a_tensor_of_counters_gives_the_bits_of_python_integers() -> None:
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (4, 200), dtype=np.uint64)
    key = (0xDEADBEEF, 0x12345678)
    found = philox(tuple(torch.from_numpy(each.astype(np.int64)) for each in counters), tensors(key))  # type: ignore[arg-type]
    expected = [in_python(tuple(int(word) for word in counter), key) for counter in counters.T]
    assert torch.stack(found, dim=1).tolist() == [list(words) for words in expected]


def in_python(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    (a, b, c, d), (one, two) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (second >> 32) ^ b ^ one, second & WORD, (first >> 32) ^ d ^ two, first & WORD
        one, two = (one + 0x9E3779B9) & WORD, (two + 0xBB67AE85) & WORD
    return a, b, c, d
