"""The losses of the smoke recipe are reproducible, so these tests detect a change of the arithmetic.

Two runs on one machine have the same losses. In the environment recorded in tests/golden/smoke.json, the losses equal
the recorded ones. If you change the arithmetic on purpose, the test fails and shows the new losses. Copy them into
the file, and give the reason in the commit.
"""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import run_program

from pipeline.runs import artifacts
from pipeline.runs.metrics import read_metrics

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "smoke.json").read_text())
STAGES = ("sft", "qat")
SETTINGS = ("recipe=smoke", *(f"{stage}.{key}" for stage in STAGES for key in ("max_steps=5", "logging_steps=1")))


def libraries() -> dict[str, str]:
    """Return the library versions that the losses depend on. The recorded versions must be the pinned versions."""
    return {name: version(name).partition("+")[0] for name in ("torch", "transformers", "trl", "nvidia-modelopt")}


def machine() -> dict[str, str]:
    """Return what can change the last bits of a loss. The versions of libraries are left out."""
    return {
        "build": version("torch").partition("+")[2],
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def run(run_dir: Path) -> dict[str, list[float]]:
    for stage in ("upcast", "sft", "quantize", "qat"):
        assert run_program(f"stage={stage}", f"run_dir={run_dir}", *SETTINGS) == 0
    return {stage: [line["loss"] for line in read_metrics(run_dir / stage) if "loss" in line] for stage in STAGES}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    run_dir = tmp_path_factory.mktemp("golden") / "first"
    return run_dir, run(run_dir)


def test_the_same_seed_gives_the_same_losses_and_weights_to_the_bit(
    first: tuple[Path, dict[str, list[float]]], tmp_path: Path
) -> None:
    run_dir, losses = first
    assert run(tmp_path) == losses
    assert all(len(each) == 5 for each in losses.values())
    for stage in STAGES:
        assert artifacts.load(tmp_path / stage).fingerprint == artifacts.load(run_dir / stage).fingerprint


def test_the_losses_equal_the_recorded_ones(first: tuple[Path, dict[str, list[float]]]) -> None:
    assert libraries() == GOLDEN["libraries"], "record the losses again, with the pinned versions"
    if machine() != GOLDEN["machine"]:
        pytest.skip(f"needs the machine of the record: {GOLDEN['machine']}, this is {machine()}")
    losses = first[1]
    recorded = {stage: GOLDEN[stage] for stage in STAGES}
    assert losses == {stage: pytest.approx(recorded[stage], abs=1e-5) for stage in STAGES}, json.dumps(losses)
