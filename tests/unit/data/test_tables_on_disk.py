"""Tables on disk: each is made once, found again, and never left half-written."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Features, Value

from pipeline.config import ModelConfig, PipelineConfig, Stage
from pipeline.data import tables
from pipeline.errors import UserError
from pipeline.runs.run import Run

NUMBERS = Features({"number": Value("int64")})


class Source:
    """Makes rows, and counts how often it is called. Raises `error` after `fail_at` rows."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.made = 0
        self._fail_at = fail_at
        self._error = error or RuntimeError("broken")
        self._lock = threading.Lock()  # a lock cannot be pickled, so this also tests that the source is called directly

    def __call__(self) -> Iterator[dict[str, Any]]:
        with self._lock:
            self.made += 1
        for i in range(10):
            if i == self._fail_at:
                raise self._error
            yield {"number": i}


def run_in(run_dir: Path) -> Run:
    return Run(PipelineConfig(stage=Stage.sft, run_dir=str(run_dir), model=ModelConfig(path="unused")))


def numbers(run_dir: Path, source: Source, *key: Any) -> list[int]:
    return list(tables.table(run_in(run_dir), key, NUMBERS, source)["number"])


def test_a_table_is_made_once(tmp_path: Path) -> None:
    source = Source()
    assert numbers(tmp_path, source, "a") == numbers(tmp_path, source, "a") == list(range(10))
    assert source.made == 1


@pytest.mark.parametrize("other", [("b",), ("a", 1), ()])
def test_another_key_is_another_table(other: tuple, tmp_path: Path) -> None:
    source = Source()
    numbers(tmp_path, source, "a")
    numbers(tmp_path, source, *other)
    assert source.made == 2


@pytest.mark.parametrize("fail_at", [0, 5])
@pytest.mark.parametrize("error", [UserError("row 6 is wrong."), KeyboardInterrupt()], ids=["mistake", "interruption"])
def test_an_error_in_the_rows_passes_through_and_leaves_no_table(
    fail_at: int, error: BaseException, tmp_path: Path
) -> None:
    with pytest.raises(type(error)) as caught:
        numbers(tmp_path, Source(fail_at, error), "a")
    assert caught.value is error
    source = Source()
    assert numbers(tmp_path, source, "a") == list(range(10))
    assert source.made == 1


def test_the_unfinished_table_of_a_killed_run_is_made_again(tmp_path: Path) -> None:
    numbers(tmp_path, Source(), "a")
    (whole,) = (path.parent for path in tmp_path.rglob("dataset_info.json"))
    whole.rename(f"{whole}.incomplete")
    source = Source()
    assert numbers(tmp_path, source, "a") == list(range(10))
    assert source.made == 1


def test_a_table_that_was_not_yet_on_the_disk_at_a_power_cut_is_made_again(tmp_path: Path) -> None:
    numbers(tmp_path, Source(), "a")
    (whole,) = tmp_path.rglob("whole")
    whole.unlink()
    for path in whole.parent.rglob("*.*"):
        if path.is_file():
            path.write_bytes(b"")  # the contents are lost, but the names are there
    source = Source()
    assert numbers(tmp_path, source, "a") == list(range(10))
    assert source.made == 1


def test_a_table_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    numbers(tmp_path, Source(), "a")
    before = [Path(path).name for path in synced[: [Path(path).name for path in synced].index("whole.tmp")]]
    assert {"dataset_info.json", "generator-train.arrow", "0.0.0"} <= {*before}


def test_one_of_several_threads_writes_the_table_and_the_others_wait(tmp_path: Path) -> None:
    source = Source()
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(numbers(tmp_path, source, "a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [list(range(10))] * 4
    assert source.made == 1


def test_a_run_dir_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"run_dir=.*: cannot write .*run/data"):
        numbers(tmp_path / "run", Source(), "a")


def test_a_full_disk_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left on device"):
        numbers(tmp_path, Source(5, OSError(28, "No space left on device")), "a")
