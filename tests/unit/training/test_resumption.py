"""Training resumes from the newest complete checkpoint, if the current processes can read it."""

from pathlib import Path

import pytest

from pipeline.config import Sharding
from pipeline.errors import UserError
from pipeline.training import resume


def write_checkpoint(directory: Path, step: int, sharding: Sharding) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir()
    resume.mark_complete(path, sharding)
    return path


def test_the_newest_complete_checkpoint_is_found_and_incomplete_ones_are_removed(tmp_path: Path) -> None:
    for step in (5, 10):
        newest = write_checkpoint(tmp_path, step, Sharding.none)
    (tmp_path / "checkpoint-15").mkdir()
    assert resume.find_last_complete(tmp_path, "sft", Sharding.none) == newest
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", "checkpoint-10"}
    assert resume.read_step(newest) == 10


def test_without_checkpoints_there_is_nothing_to_resume_from(tmp_path: Path) -> None:
    assert resume.find_last_complete(tmp_path / "missing", "sft", Sharding.none) is None


@pytest.mark.parametrize("sharding", [Sharding.none, Sharding.zero3], ids=str)
def test_a_checkpoint_with_another_sharding_is_an_error(tmp_path: Path, sharding: Sharding) -> None:
    written = write_checkpoint(tmp_path, 5, Sharding.zero2)
    with pytest.raises(UserError) as caught:
        resume.find_last_complete(tmp_path, "sft", sharding)
    assert str(caught.value) == (
        f"{written}: was written with sharding=zero2 and cannot be read with sharding={sharding.name}."
        f" Use sharding=zero2, or delete {tmp_path} to start again."
    )
    assert written.is_dir()


def test_training_is_resumed_with_the_same_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "process_count", lambda: 3)
    settings = {"sft.batch_size": 2, "sft.gradient_accumulation_steps": 6, "sft.seed": 1}
    assert resume.by_global_batch(settings) == {
        "sft.seed": 1,
        "sft.batch_size x sft.gradient_accumulation_steps x processes": 36,
    }
    assert settings["sft.batch_size"] == 2
