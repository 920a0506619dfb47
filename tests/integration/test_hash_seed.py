"""Saved files do not depend on the hash seed of the process, so an unchanged rebuild has the same fingerprint."""

import os
import subprocess
import sys
from pathlib import Path

from run_files import read_files
from save_quantized import save

ROOT = Path(__file__).parents[2]
SEED = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"  # another seed than that of this process


def test_adapters_and_quantizers_are_saved_as_the_same_bytes_with_any_hash_seed(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    script = str(Path(__file__).with_name("save_quantized.py"))
    environment = {**os.environ, "PYTHONHASHSEED": SEED, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script, str(there)], env=environment) as process:
        save(here)
    assert process.returncode == 0
    assert {"modelopt_state.pth", "adapter_config.json", "adapter_model.safetensors"} == read_files(here).keys()
    assert read_files(here) == read_files(there)
