"""Attention implementations that work only on a GPU: flex attention, and torch's flash kernel for CUDA."""

import pytest
import torch

from pipeline.config import Precision, TrainConfig
from pipeline.models import sink_attention
from pipeline.models.attention import FUSED_SINKS
from pipeline.training import attention_check
from tests.attention_cases import LENGTH, SPANS, WINDOWS, assert_as_close_as_eager, packed_positions, spans_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

has_flash = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs compute capability 8.0"
)


@pytest.mark.parametrize("precision", Precision)
def test_flex_attention_passes_on_a_gpu(precision: Precision) -> None:
    attention_check.check(TrainConfig(attn_implementation="flex_attention", precision=precision), "sft")


@has_flash
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("precision", [Precision.mixed_bf16, Precision.bf16])
def test_auto_chooses_the_flash_kernel_after_its_check(precision: Precision, is_packed: bool) -> None:
    assert attention_check.check(TrainConfig(precision=precision, packing=is_packed), "sft") == FUSED_SINKS


@has_flash
@pytest.mark.parametrize("precision", ["bf16", "mixed"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_padded_rows_on_a_gpu_have_the_outputs_and_gradients_of_eager(
    spans: list[tuple[int, int]], window: int | None, precision: str
) -> None:
    """Compare outputs, and the gradients of queries, keys, values and sinks. Eight query heads share a key head."""
    is_real = spans_mask(spans).cuda()
    documents = torch.zeros(2, LENGTH, device="cuda")
    assert_as_close_as_eager(sink_attention.padded_rows(is_real), is_real, documents, window, precision)


@has_flash
@pytest.mark.parametrize("precision", ["bf16", "mixed"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_packed_documents_on_a_gpu_have_the_outputs_and_gradients_of_eager(window: int | None, precision: str) -> None:
    positions, documents = (each.cuda() for each in packed_positions())
    is_real = torch.ones(2, LENGTH, dtype=torch.bool, device="cuda")
    assert_as_close_as_eager(sink_attention.packed_row(positions), is_real, documents, window, precision)


@has_flash
def test_masks_and_attention_make_no_host_sync() -> None:
    """`packed_row` copies to the host, so it is not tested.

    Training does not need it: TRL's collator makes the bounds.
    """
    is_real = spans_mask(SPANS["padding on both sides"]).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        segments = sink_attention.padded_rows(is_real)
        module = torch.nn.Module()
        module.sinks = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16, device="cuda"))
        query, key = (
            torch.zeros(2, heads, LENGTH, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            for heads in (8, 1)
        )
        sink_attention.attend(module, query, key, key, segments, 0.125, sliding_window=128)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
