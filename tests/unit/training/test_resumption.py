"""Training resumes from the newest complete checkpoint, if the current processes can read it."""

import json
import os
from pathlib import Path

import pytest

from pipeline.config import Sharding
from pipeline.errors import UserError
from pipeline.runs.artifacts import SAMPLES_FILE, WHOLE_FILE
from pipeline.runs.metrics import METRICS_FILE, read_metrics
from pipeline.runs.tracking import log_metrics
from pipeline.runs.training_checkpoints import read_step
from pipeline.training import resume


def write_checkpoint(directory: Path, step: int, sharding: Sharding, best: int | None = None) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
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
    assert read_step(newest) == 10


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


@pytest.mark.parametrize("marker", ["", "[]", "{}", '{"sharding": "none", "files": 1}', "\xff"])
def test_a_checkpoint_with_a_damaged_marker_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], marker: str
) -> None:
    (write_checkpoint(tmp_path, 5, Sharding.none) / WHOLE_FILE).write_text(marker, encoding="latin-1")
    assert resume.find_last_complete(tmp_path, "sft", Sharding.none) is None
    assert "removing checkpoint-5: whole is not readable" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["checkpoint-5-copy", "checkpoint-old", "checkpoint-5.bak"])
def test_a_copy_that_the_user_made_is_left_alone(tmp_path: Path, name: str) -> None:
    newest = write_checkpoint(tmp_path, 5, Sharding.none)
    (tmp_path / name).mkdir()
    assert resume.find_last_complete(tmp_path, "sft", Sharding.none) == newest
    assert remaining(tmp_path) == {"checkpoint-5", name}


def write_stage(directory: Path) -> Path:
    """Write what a stage leaves if it is killed after step 3, with checkpoints of steps 1 and 2. Return the latter."""
    for step in range(4):
        log_metrics(directory, {"step": step, "eval_loss": 1.0 / (step + 1)})
        with (directory / SAMPLES_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "answer": "é"}) + "\n")
        if step in (1, 2):
            newest = write_checkpoint(directory / "checkpoints", step, Sharding.none)
            log = [{"step": each, "eval_loss": 1.0 / (each + 1)} for each in range(step + 1)]
            (newest / "trainer_state.json").write_text(json.dumps({"best_global_step": None, "log_history": log}))
            (newest / WHOLE_FILE).unlink()
            resume.mark_complete(newest, Sharding.none)
    return newest


def cut_line(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[2:]))


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "garbage": lambda path: path.write_bytes(path.read_bytes().replace(b'"step": 1', b"\xff\x00{")),
    "another object": lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\n[]\n", 1)),
    "a line lost": cut_line,
    "a figure changed": lambda path: path.write_bytes(path.read_bytes().replace(b"5", b"4")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [METRICS_FILE, SAMPLES_FILE])
def test_lost_lines_of_metrics_and_samples_come_back_from_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    newest = write_stage(tmp_path)
    wanted = b"".join((tmp_path / name).read_bytes().splitlines(keepends=True)[:3])
    if name == SAMPLES_FILE and damage == "a figure changed":
        DAMAGES["a line lost"](tmp_path / name)
    else:
        DAMAGES[damage](tmp_path / name)
    assert resume.find_last_complete(tmp_path / "checkpoints", "sft", Sharding.none) == newest
    resume.restore_records(tmp_path, "sft", newest)
    assert (tmp_path / name).read_bytes() == wanted
    assert f"{name}: lines up to step 2 are missing or damaged. They are restored" in capsys.readouterr().err


def test_whole_lines_are_kept_without_a_warning_and_later_ones_are_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume.restore_records(tmp_path, "sft", write_stage(tmp_path))
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2]
    assert len((tmp_path / SAMPLES_FILE).read_bytes().splitlines()) == 3
    assert capsys.readouterr().err == ""


def test_training_from_the_beginning_starts_without_earlier_lines(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_bytes(b"\xff\n")
    (tmp_path / SAMPLES_FILE).write_bytes(b"[\n")
    resume.restore_records(tmp_path, "sft", None)
    assert remaining(tmp_path) == set()


@pytest.mark.parametrize("damage", ["empty", "missing", "garbage", "another object", "a line lost"])
def test_a_checkpoint_of_an_older_version_is_not_used_if_lines_are_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """It has no copies of the lines, so that training starts again."""
    write_stage(tmp_path)
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        for name in (METRICS_FILE, SAMPLES_FILE):
            (checkpoint / name).unlink()
        (checkpoint / WHOLE_FILE).write_text('{"sharding": "none"}')
    newest = resume.find_last_complete(tmp_path / "checkpoints", "sft", Sharding.none)
    assert newest == tmp_path / "checkpoints" / "checkpoint-2"
    DAMAGES[damage](tmp_path / METRICS_FILE)
    assert resume.find_last_complete(tmp_path / "checkpoints", "sft", Sharding.none) is None
    assert "removing checkpoint-2: " in capsys.readouterr().err


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
