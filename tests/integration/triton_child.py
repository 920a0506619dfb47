"""Runs a script beside this file that lets inductor compile for a GPU. It needs a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.numerics.compiled import can_compile

NEEDS_COMPILERS = [
    pytest.mark.skipif(not can_compile("cpu"), reason="no C++ compiler on this machine"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
"""Marks of the tests that need such a script."""


def read_report(script: str, cache: Path, *arguments: object, **environment: str) -> Any:
    """Run the script with an empty cache of compiled code, and return the JSON value that it prints."""
    here = Path(__file__).parent
    paths = {"PYTHONPATH": str(here.parents[1]), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, str(here / script), *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, **paths, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
