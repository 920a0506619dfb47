"""Which checkpoints training goes on from: the newest whole one, if these processes can read it."""

from pathlib import Path

import pytest

from pipeline import resume
from pipeline.config import Sharding
from pipeline.errors import UserError


def checkpoint(directory: Path, step: int, processes: int, shared: Sharding, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir()
    monkeypatch.setattr(resume, "process_count", lambda: processes)
    resume.mark_whole(path, shared)
    return path


def test_the_newest_whole_checkpoint_is_found_and_torn_ones_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 10):
        newest = checkpoint(tmp_path, step, 1, Sharding.none, monkeypatch)
    (tmp_path / "checkpoint-15").mkdir()
    assert resume.last_whole(tmp_path, "sft", Sharding.none) == newest
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", "checkpoint-10"}
    assert resume.step_of(newest) == 10


def test_without_checkpoints_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert resume.last_whole(tmp_path / "missing", "sft", Sharding.none) is None


@pytest.mark.parametrize("shared", [Sharding.none, Sharding.fsdp2])
def test_any_number_of_processes_goes_on_where_checkpoints_can_be_split_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: Sharding
) -> None:
    written = checkpoint(tmp_path, 5, 2, shared, monkeypatch)
    monkeypatch.setattr(resume, "process_count", lambda: 3)
    assert resume.last_whole(tmp_path, "sft", shared) == written


@pytest.mark.parametrize(
    ("processes", "shared"), [(3, Sharding.zero2), (2, Sharding.none), (2, Sharding.zero3)], ids=str
)
def test_a_checkpoint_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, shared: Sharding
) -> None:
    written = checkpoint(tmp_path, 5, 2, Sharding.zero2, monkeypatch)
    monkeypatch.setattr(resume, "process_count", lambda: processes)
    with pytest.raises(UserError) as caught:
        resume.last_whole(tmp_path, "sft", shared)
    assert str(caught.value) == (
        f"{written}: was written by 2 processes with sharding=zero2; its files cannot be read by {processes} with"
        f" sharding={shared.name}. Go on as it was begun, or start anew with overwrite=true."
    )
    assert written.is_dir()
