"""The Triton kernels that inductor writes for GPUs give the codec's eager bits. The tests need no GPU.

A child process runs the kernels with Triton's interpreter (see interpreted_gpu.py). `test_kernels_for_gpus` checks how
Triton compiles the same kernels.
"""

from typing import Any

import pytest
from triton_child import NEEDS_COMPILERS, read_report

pytestmark = NEEDS_COMPILERS


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child process prints."""
    found: dict[str, Any] = read_report(
        "codec_on_interpreted_gpu.py", tmp_path_factory.mktemp("inductor"), TRITON_INTERPRET="1"
    )
    return found


def test_the_kernels_for_gpus_give_the_bits_of_the_eager_codec(report: dict[str, Any]) -> None:
    """The samples include every code and scale, zeros of both signs, subnormals, ties and values near the largest."""
    assert {name: use["unequal"] for name, use in report["uses"].items()} == dict.fromkeys(report["uses"], 0)


def test_every_use_runs_its_kernels_with_the_interpreter(report: dict[str, Any]) -> None:
    """Otherwise, eager results would be compared with eager results."""
    launches = {name: use["launches"] for name, use in report["uses"].items()}
    assert launches == {
        "decode to bfloat16": 1,
        "decode to float32": 1,
        "round to mxfp4 ceil": 3,
        "round to nvfp4 nearest": 4,
        "round to nvfp4 mse": 5,
        "round base + delta to mxfp4 ceil": 3,
        "encode to mxfp4 ceil": 7,
        "round stochastically to mxfp4": 11,
        "round stochastically to nvfp4": 11,
    }


def test_wrong_kernels_give_other_bits(report: dict[str, Any]) -> None:
    """Each wrong kernel is a kernel of the codec with one change."""
    assert all(use["changed"] and use["unequal"] for use in report["mutations"].values())
