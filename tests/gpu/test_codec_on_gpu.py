"""The codec gives the same bits on every device."""

import pytest
import torch

from pipeline.numerics.codec import decode, encode, fake_quantize
from pipeline.numerics.formats import FORMATS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.uint8: torch.uint8}
    return tensor.cpu().view(kinds[tensor.dtype])


@pytest.mark.parametrize("block_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_gives_the_bits_of_a_cpu(block_format, dtype: torch.dtype) -> None:
    """Over every scale: the values' exponents run from the subnormals to 2^126."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.linspace(-149, 126, 4096)[:, None].exp2()
    values = (torch.randn(4096, 2 * block_format.block_size, generator=generator).clamp(-1, 1) * exponents).to(dtype)
    for on_cpu, on_gpu in zip(encode(values, block_format), encode(values.cuda(), block_format), strict=True):
        assert torch.equal(on_cpu, on_gpu.cpu())
    blocks, scales = encode(values, block_format)
    assert torch.equal(bits(decode(blocks, scales)), bits(decode(blocks.cuda(), scales.cuda())))
    assert torch.equal(bits(fake_quantize(values, block_format)), bits(fake_quantize(values.cuda(), block_format)))
