"""The Triton kernels that inductor writes for GPUs give the codec's eager bits. The tests need no GPU.

A child process runs the kernels with Triton's interpreter (see interpreted_gpu.py). `test_kernels_for_gpus` checks how
Triton compiles the same kernels.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.numerics.compiled import can_compile

pytestmark = [
    pytest.mark.skipif(not can_compile("cpu"), reason="no C++ compiler on this machine"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child process prints."""
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": str(here.parents[1]),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor")),
        "TRITON_INTERPRET": "1",
    }
    command = [sys.executable, str(here / "codec_on_interpreted_gpu.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
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
        "round stochastically to mxfp4": 12,
        "round stochastically to nvfp4": 12,
    }


def test_wrong_kernels_give_other_bits(report: dict[str, Any]) -> None:
    """Each wrong kernel is a kernel of the codec with one change."""
    assert all(use["changed"] and use["unequal"] for use in report["mutations"].values())
