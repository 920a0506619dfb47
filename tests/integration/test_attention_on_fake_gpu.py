"""Attention with sinks on a GPU that does not exist: kernels, devices and sizes of all tensors."""

import json
import subprocess
import sys
from typing import Any

import pytest
from forks import ROOT

from pipeline.models.attention import FUSED_SINKS

CASES = [
    f"{FUSED_SINKS} {layer} {kind}"
    for layer in ("full_attention", "sliding_attention")
    for kind in ("padded", "packed")
]
CONTROL = "eager full_attention padded"


@pytest.fixture(scope="module")
def on_fake_gpu() -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "tests.fake_attention", *CASES, CONTROL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", CASES)
def test_on_cuda_the_flash_kernel_runs_in_both_directions_and_no_tensor_has_the_size_of_the_scores(
    case: str, on_fake_gpu: dict[str, dict[str, Any]]
) -> None:
    """A layer of gpt-oss-20b gets 4 rows of 4,096 tokens. The largest fake tensor has B·T·N·d elements."""
    found = on_fake_gpu[case]
    before = 127 if "sliding" in case else None  # the window of 128 includes the query's own key
    assert found["kernels"] == [["_flash_attention_forward", before], ["_flash_attention_backward", before]]
    assert found["largest"] == 4 * 4096 * 64 * 64 < found["scores"] / 60
    assert found["gradients"]["sinks"] == [64] and len(found["gradients"]) == 9


def test_on_cuda_eager_makes_all_scores(on_fake_gpu: dict[str, dict[str, Any]]) -> None:
    found = on_fake_gpu[CONTROL]
    assert found["kernels"] == [] and found["largest"] > found["scores"]
