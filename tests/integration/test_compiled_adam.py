"""The compiled update of torchao's optimizers needs as much memory on a GPU as its stand-in allocates."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.doctor import low_bit_adam
from pipeline.numerics.compiled import can_compile

pytestmark = [
    pytest.mark.skipif(not can_compile("cpu"), reason="no C++ compiler on this machine"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def test_the_update_allocates_what_the_stand_in_allocates(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(here.parents[1]), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(here / "adam_on_pretended_gpu.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [tuple(each) for each in json.loads(done.stdout)]
    assert {name for name, *_ in found} == set(low_bit_adam.BITS)
    assert found == [(name, values, low_bit_adam.update_bytes(name, values)) for name, values, _ in found]
