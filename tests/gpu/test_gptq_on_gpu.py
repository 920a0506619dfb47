"""GPTQ on a GPU rounds a stack at once, and almost all weights are those of the CPU.

Matrix products differ in the last bits. A value beside a tie may become its other neighbour, and later columns follow.
"""

import pytest
import torch

from pipeline.numerics.codec import fake_quantize, same_bits
from pipeline.numerics.formats import MXFP4, NVFP4, BlockFormat
from pipeline.numerics.gptq import Hessians, round_gptq

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("block_format", [MXFP4, NVFP4, NVFP4.with_rule("mse")], ids=["mxfp4", "nvfp4", "nvfp4-mse"])
def test_a_gpu_rounds_as_well_as_a_cpu(block_format: BlockFormat) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 192, 320, generator=generator).bfloat16()
    tokens = torch.randn(2000, 8, generator=generator) @ torch.randn(8, 320, generator=generator)
    tokens += torch.randn(2000, 320, generator=generator)
    errors, rounded = {}, {}
    for device in ("cpu", "cuda"):
        hessians = Hessians(4, 320, device)
        for expert in range(4):
            hessians.add(expert, tokens.to(device))
        found = round_gptq(weights.to(device), hessians.means, block_format)
        assert same_bits(fake_quantize(found, block_format), found)
        rounded[device] = found.cpu()
        errors[device] = ((rounded[device].float() - weights.float()) @ tokens.mT).square().mean()
    assert (rounded["cpu"] != rounded["cuda"]).float().mean() < 0.02
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.01)
