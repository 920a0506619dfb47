"""scripts/gpu_check runs its sections on a pretended GPU, and fails if one of its checks fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ON_GPU = f"{sys.executable} {ROOT / 'tests' / 'on_pretended_gpu.py'}"


def check(out: Path, *sections: str, python: str = ON_GPU) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """Run sections at tiny sizes. Return the exit status and the rows of each section."""
    command = [sys.executable, ROOT / "scripts" / "gpu_check", "--sizes", "tiny", "--out", out, "--sections", *sections]
    environment = {**os.environ, "GPU_CHECK_PYTHON": python}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=590, check=False)
    return done.returncode, json.loads((out / "gpu_check.json").read_text(encoding="utf-8"))


def test_every_quick_section_passes(tmp_path: Path) -> None:
    names = ("machine", "codec", "generation")
    status, rows = check(tmp_path, *names)
    assert status == 0
    assert tuple(rows) == names
    checked = [row["is_right"] for name in ("codec", "generation") for row in rows[name]]
    assert checked == [True] * 4
    assert "| bits of the GPU, eager | equal |" in (tmp_path / "gpu_check.md").read_text(encoding="utf-8")


def test_training_is_measured_beside_plain_trl(tmp_path: Path) -> None:
    status, rows = check(tmp_path, "training")
    assert status == 0
    values = {row["name"]: row["value"] for row in rows["training"]}
    ratio = values["SFT with LoRA / plain TRL + PEFT, SFT"]
    assert ratio == values["SFT with LoRA"] / values["plain TRL + PEFT, SFT"] > 0


def test_a_machine_without_a_gpu_is_an_error(tmp_path: Path) -> None:
    status, rows = check(tmp_path, "machine", python=sys.executable)
    assert status == 1
    (row,) = rows["machine"]
    assert (row["value"], row["beside"], row["is_right"]) == ("failed", "no GPU is visible to torch here", False)
