"""Attention implementations that work only on a GPU. On a GPU, flex attention applies the sinks."""

import pytest
import torch

from pipeline.config import Precision, TrainConfig
from pipeline.training import attention_check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", Precision)
def test_flex_attention_passes_on_a_gpu(precision: Precision) -> None:
    attention_check.check(TrainConfig(attn_implementation="flex_attention", precision=precision), "sft")
