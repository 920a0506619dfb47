"""Training resumes from the newest complete checkpoint, if the current processes can read it."""

import json
import os
from pathlib import Path

import pytest

from pipeline.config import Sharding
from pipeline.errors import UserError
from pipeline.runs.artifacts import WHOLE_FILE
from pipeline.training import resume


def write_checkpoint(directory: Path, step: int, sharding: Sharding, best: int | None = None) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir()
    (path / "optimizer.pt").write_bytes(b"states of step %d" % step)
    (path / "trainer_state.json").write_text(json.dumps({"best_global_step": best}))
    resume.mark_complete(path, sharding)
    return path


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def remaining(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_newest_complete_checkpoint_is_found_and_incomplete_ones_are_removed(tmp_path: Path) -> None:
    for step in (5, 10):
        newest = write_checkpoint(tmp_path, step, Sharding.none)
    (tmp_path / "checkpoint-15").mkdir()
    assert resume.find_last_complete(tmp_path, "sft", Sharding.none) == newest
    assert remaining(tmp_path) == {"checkpoint-5", "checkpoint-10"}
    assert resume.read_step(newest) == 10


@pytest.mark.parametrize(
    ("break_file", "problem"),
    [(Path.unlink, "optimizer.pt missing"), (flip_bit, "optimizer.pt changed after the checkpoint was written")],
    ids=["missing", "changed"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], break_file, problem: str
) -> None:
    earlier = write_checkpoint(tmp_path, 5, Sharding.none)
    break_file(write_checkpoint(tmp_path, 10, Sharding.none) / "optimizer.pt")
    assert resume.find_last_complete(tmp_path, "sft", Sharding.none) == earlier
    assert remaining(tmp_path) == {"checkpoint-5"}
    assert f"removing checkpoint-10: {problem}. Training resumes from" in capsys.readouterr().err


def test_a_checkpoint_is_not_used_if_its_best_weights_are_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_checkpoint(tmp_path, 5, Sharding.none, best=5)
    flip_bit(write_checkpoint(tmp_path, 10, Sharding.none, best=10) / "optimizer.pt")
    write_checkpoint(tmp_path, 15, Sharding.none, best=10)
    assert resume.find_last_complete(tmp_path, "sft", Sharding.none) == first
    assert remaining(tmp_path) == {"checkpoint-5"}
    assert "removing checkpoint-15: the best weights before it, checkpoint-10, are missing" in capsys.readouterr().err


def test_a_checkpoint_is_on_the_disk_before_it_is_marked_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    path = write_checkpoint(tmp_path, 5, Sharding.none)
    marker = synced.index(str(path / f"{WHOLE_FILE}.tmp"))
    assert {str(path), str(path / "optimizer.pt"), str(path / "trainer_state.json")} <= set(synced[:marker])


def test_checkpoints_of_older_versions_have_no_digests_and_are_used(tmp_path: Path) -> None:
    newest = write_checkpoint(tmp_path, 5, Sharding.none)
    (newest / WHOLE_FILE).write_text('{"sharding": "none"}')
    assert resume.find_last_complete(tmp_path, "sft", Sharding.none) == newest


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
