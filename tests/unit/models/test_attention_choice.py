"""`auto` chooses an attention implementation by device and precision."""

import importlib.util

import pytest
import torch

from pipeline.config import Precision, TrainConfig
from pipeline.models import attention

HOPPER, TURING = (9, 0), (7, 5)


@pytest.fixture(autouse=True)
def triton_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def test_auto_is_eager_on_a_cpu_unless_documents_are_packed() -> None:
    assert attention.candidates(torch.bfloat16, None) == ("eager",)
    assert attention.for_training(TrainConfig(), None) == "eager"
    assert attention.for_training(TrainConfig(packing=True), None) == "fused_sinks"


@pytest.mark.parametrize(
    ("dtype", "gpu", "names"),
    [
        (torch.bfloat16, HOPPER, ("fused_sinks", "flex_attention", "eager")),
        (torch.bfloat16, (8, 0), ("fused_sinks", "flex_attention", "eager")),
        (torch.bfloat16, (12, 0), ("fused_sinks", "flex_attention", "eager")),
        (torch.bfloat16, TURING, ("flex_attention", "eager")),
        (torch.float32, HOPPER, ("flex_attention", "eager")),
    ],
)
def test_auto_prefers_the_flash_kernel_where_it_runs(
    dtype: torch.dtype, gpu: tuple[int, int], names: tuple[str, ...]
) -> None:
    assert attention.candidates(dtype, gpu) == names


def test_auto_does_not_choose_flex_attention_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert attention.candidates(torch.float32, HOPPER) == ("eager",)


@pytest.mark.parametrize("precision", Precision)
def test_a_named_implementation_is_kept(precision: Precision) -> None:
    settings = TrainConfig(attn_implementation="eager", precision=precision)
    assert attention.for_training(settings, HOPPER) == "eager"


def test_mixed_precision_counts_as_bf16() -> None:
    chosen = {each: attention.for_training(TrainConfig(precision=each), HOPPER) for each in Precision}
    assert chosen == {
        Precision.fp32: "flex_attention",
        Precision.mixed_bf16: "fused_sinks",
        Precision.bf16: "fused_sinks",
    }


@pytest.mark.parametrize(
    ("precision", "dtype", "name"),
    [
        (Precision.mixed_bf16, torch.float32, "fused_sinks"),
        (Precision.bf16, torch.bfloat16, "fused_sinks"),
        (Precision.bf16, torch.float32, "eager"),
    ],
)
def test_a_teacher_that_computes_in_another_type_uses_eager(
    precision: Precision, dtype: torch.dtype, name: str
) -> None:
    assert attention.for_teacher("fused_sinks", precision, dtype) == name


@pytest.mark.parametrize(
    ("gpu", "dtype", "name"),
    [
        (HOPPER, torch.bfloat16, "fused_sinks"),
        (HOPPER, torch.float32, "eager"),
        (TURING, torch.bfloat16, "eager"),
        (None, torch.bfloat16, "eager"),
    ],
)
def test_evaluation_uses_the_flash_kernel_or_eager(
    gpu: tuple[int, int] | None, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "capability", lambda: gpu)
    assert attention.for_inference(dtype) == name
