"""Which checkpoints training goes on from: the newest whole one, if these processes can read it."""

from pathlib import Path

import pytest

from pipeline.config import Sharding
from pipeline.errors import UserError
from pipeline.training import resume


def checkpoint(directory: Path, step: int, shared: Sharding) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir()
    resume.mark_whole(path, shared)
    return path


def test_the_newest_whole_checkpoint_is_found_and_torn_ones_are_removed(tmp_path: Path) -> None:
    for step in (5, 10):
        newest = checkpoint(tmp_path, step, Sharding.none)
    (tmp_path / "checkpoint-15").mkdir()
    assert resume.last_whole(tmp_path, "sft", Sharding.none) == newest
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", "checkpoint-10"}
    assert resume.step_of(newest) == 10


def test_without_checkpoints_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert resume.last_whole(tmp_path / "missing", "sft", Sharding.none) is None


@pytest.mark.parametrize("shared", [Sharding.none, Sharding.zero3], ids=str)
def test_a_checkpoint_that_was_sharded_otherwise_is_an_error(tmp_path: Path, shared: Sharding) -> None:
    written = checkpoint(tmp_path, 5, Sharding.zero2)
    with pytest.raises(UserError) as caught:
        resume.last_whole(tmp_path, "sft", shared)
    assert str(caught.value) == (
        f"{written}: was written with sharding=zero2; its files cannot be read with sharding={shared.name}."
        " Go on as it was begun, or start anew with overwrite=true."
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
