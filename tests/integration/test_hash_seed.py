"""Saved files do not depend on the hash seed of the process, so an unchanged rebuild has the same fingerprint."""

import os
import subprocess
import sys
from pathlib import Path

import forks
from run_files import read_files
from save_quantized import save

SCRIPT = Path(__file__).with_name("save_quantized.py")


def test_adapters_and_quantizers_are_saved_as_the_same_bytes_with_any_hash_seed(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    # The server of the forks is another interpreter. It draws a seed of its own, unless the environment has one.
    has_given_seed = "PYTHONHASHSEED" in os.environ
    python = [sys.executable] if has_given_seed else forks.interpreter()
    given = {"PYTHONHASHSEED": "1" if os.environ["PYTHONHASHSEED"] != "1" else "2"} if has_given_seed else {}
    with subprocess.Popen(
        [*python, SCRIPT, there], env={**forks.environment(), **given}, stdout=subprocess.PIPE, text=True
    ) as process:
        save(here)
        seeds_differ = process.communicate()[0].split()[-1] != str(hash("a text"))
    assert process.returncode == 0 and seeds_differ
    assert {"modelopt_state.pth", "adapter_config.json", "adapter_model.safetensors"} == read_files(here).keys()
    assert read_files(here) == read_files(there)
