"""A ZeRO checkpoint is converted only once, and only if the number of processes has changed. DeepSpeed is simulated."""

import os
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import zero_checkpoints

CONVERTER = """
import sys
from pathlib import Path
given = dict(word.removeprefix("--").split("=") for word in sys.argv[1:] if "=" in word)
assert len(list(Path(given["input_folder"]).glob("*_optim_states.pt"))) == 2
output = Path(given["output_folder"])
output.mkdir()  # fails if an interrupted conversion left it
(output.parent / "latest_universal").write_text(output.name)
"""


class FakeDeepSpeedEngine:
    """Stands in for DeepSpeed's engine, and records its reads."""

    def __init__(self) -> None:
        self._config = SimpleNamespace(load_universal_checkpoint=False)
        self.read: list[tuple[str, bool, dict[str, Any]]] = []
        # Two groups, as in full training: weights with and without weight decay.
        self.optimizer = SimpleNamespace(param_groups=[{"params": [1], "lr": 0.5, "decay": 0.1}, {"params": [2, 3]}])
        self.optimizer.param_groups[1] |= {"lr": 0.5, "decay": 0.0}
        self.optimizer.state = {"first": {}, "second": {}}

    def load_checkpoint(self, load_dir: str, **more: Any) -> str:
        self.read.append((Path(load_dir).name, self._config.load_universal_checkpoint, more))
        first, *others = self.optimizer.param_groups
        first["lr"] = 0.25
        if self._config.load_universal_checkpoint:  # imitate the errors of DeepSpeed 0.19.8
            for group in others:
                group |= {**first, "params": []}
            step = torch.tensor(3)
            for state in self.optimizer.state.values():
                state["step"] = step
        return "read"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDeepSpeedEngine:
    """Simulate DeepSpeed's engine and its converter."""
    module = ModuleType("deepspeed")
    module.DeepSpeedEngine = FakeDeepSpeedEngine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    converts_to(CONVERTER, monkeypatch, tmp_path)
    return FakeDeepSpeedEngine()


def converts_to(code: str, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    (directory / "fake_converter.py").write_text(code)
    monkeypatch.setattr(zero_checkpoints, "_CONVERTER", "fake_converter")
    monkeypatch.setenv("PYTHONPATH", str(directory))


def checkpoint(directory: Path, step: int, processes: int) -> Path:
    path = directory / f"checkpoint-{step}"
    native = path / f"global_step{step}"
    native.mkdir(parents=True)
    (path / "latest").write_text(native.name)
    for rank in range(processes):
        (native / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(b"123")
    return path


def run_by(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_checkpoints, "process_count", lambda: processes)
    monkeypatch.setattr(zero_checkpoints, "wait_for_everyone", lambda: None)


def test_only_checkpoints_of_other_numbers_of_processes_are_converted(
    engine: FakeDeepSpeedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes read a checkpoint of two processes, then a checkpoint of three, then the first one again."""
    run_by(3, monkeypatch)
    theirs, own = checkpoint(tmp_path, 2, 2), checkpoint(tmp_path, 4, 3)
    with zero_checkpoints.convert_when_needed():
        for path in (theirs, own, theirs):
            assert engine.load_checkpoint(str(path), load_optimizer_states=True) == "read"
    more = {"load_optimizer_states": True}
    assert engine.read == [(theirs.name, True, more), (own.name, False, more), (theirs.name, True, more)]
    assert engine.optimizer.param_groups == [
        {"params": [1], "lr": 0.25, "decay": 0.1},
        {"params": [], "lr": 0.25, "decay": 0.0},
    ]
    for state in engine.optimizer.state.values():
        state["step"] += 1
        assert state["step"] == 4
    assert not (own / zero_checkpoints._UNIVERSAL).exists()
    assert (theirs / "global_step2_universal").is_dir()


def test_an_interrupted_conversion_is_repeated(
    engine: FakeDeepSpeedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(3, monkeypatch)
    path = checkpoint(tmp_path, 2, 2)
    (path / "global_step2_universal" / "zero").mkdir(parents=True)
    with zero_checkpoints.convert_when_needed():
        engine.load_checkpoint(str(path))
    assert list((path / "global_step2_universal").iterdir()) == []


@pytest.mark.parametrize("launched", [True, False])
def test_the_converter_uses_all_cores_if_a_launcher_limits_the_threads_of_a_process(
    launched: bool, engine: FakeDeepSpeedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a launcher, the limit is the user's own, so the converter keeps it."""
    run_by(3, monkeypatch)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "3" if launched else "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    threads = "\nimport os\n(output / 'threads').write_text(os.environ['OMP_NUM_THREADS'])\n"
    converts_to(CONVERTER + threads, monkeypatch, tmp_path)
    path = checkpoint(tmp_path, 2, 2)
    with zero_checkpoints.convert_when_needed():
        engine.load_checkpoint(str(path))
    found = int((path / "global_step2_universal" / "threads").read_text())
    assert found == (len(os.sched_getaffinity(0)) if launched else 1000)


def test_the_patch_of_deepspeed_is_removed_after_the_block(engine: FakeDeepSpeedEngine) -> None:
    before = FakeDeepSpeedEngine.load_checkpoint
    with pytest.raises(ValueError, match="training stops"), zero_checkpoints.convert_when_needed():
        assert FakeDeepSpeedEngine.load_checkpoint is not before
        raise ValueError("training stops")
    assert FakeDeepSpeedEngine.load_checkpoint is before


def test_the_error_of_a_failed_conversion_says_why_and_what_to_do(
    engine: FakeDeepSpeedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(3, monkeypatch)
    path = checkpoint(tmp_path, 2, 2)
    converts_to("raise KeyError('exp_avg')", monkeypatch, tmp_path)
    with zero_checkpoints.convert_when_needed(), pytest.raises(UserError) as caught:
        engine.load_checkpoint(str(path))
    assert str(caught.value) == (
        f"{path}: was written by 2 processes, and DeepSpeed cannot convert it for 3 (KeyError: 'exp_avg')."
        f" Resume with as many processes as before, or delete {path.parent} to start again."
    )
    assert engine.read == []


def test_too_little_disk_space_is_an_error_before_anything_is_written(
    engine: FakeDeepSpeedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_by(3, monkeypatch)
    path = checkpoint(tmp_path, 2, 2)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(11))
    with zero_checkpoints.convert_when_needed(), pytest.raises(UserError, match=r"needs 0\.000012 MB"):
        engine.load_checkpoint(str(path))
    assert not (path / "global_step2_universal").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(12))
    with zero_checkpoints.convert_when_needed():
        engine.load_checkpoint(str(path))
