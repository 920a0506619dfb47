"""Folders: the files of a split are chosen by their names, and files that are not read are reported."""

import json
import shutil
from pathlib import Path

import pytest
from data_files import ROWS, conversations, jsonl, load_error

from pipeline.data.parsing import parse_conversation

pytestmark = pytest.mark.usefixtures("working_directory")


@pytest.fixture
def folder() -> Path:
    folder = Path("data")
    folder.mkdir()
    return folder


def answers(folder: Path, **settings: str) -> list[object]:
    found = conversations(folder, **settings)
    return [next(i for i, row in enumerate(ROWS) if parse_conversation(row) == each) for each in found]


def test_files_that_name_no_split_are_all_read(folder: Path) -> None:
    jsonl(folder / "b.jsonl", ROWS[2:4])
    jsonl(folder / "a.jsonl", ROWS[:2])
    assert answers(folder) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["test.jsonl", "chats-test.jsonl", "test-00000-of-00001.jsonl", "eval_set.jsonl"])
def test_files_of_another_split_are_not_read_and_reported(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonl(folder / "chats.jsonl", ROWS[:2])
    jsonl(folder / "train.jsonl", ROWS[2:4])
    jsonl(folder / name, ROWS[4:6])
    assert answers(folder) == [0, 1, 2, 3]
    assert f"data.split=train: chats.jsonl, train.jsonl of data, and not {name}" in capsys.readouterr().out
    assert answers(folder, split="test") == [4, 5]


@pytest.mark.parametrize("split", ["validation", "dev", "valid"])
def test_the_usual_names_of_a_split_mean_the_same(split: str, folder: Path) -> None:
    jsonl(folder / "train.jsonl", ROWS[:2])
    jsonl(folder / "val.jsonl", ROWS[2:4])
    assert answers(folder, split=split) == [2, 3]


def test_a_split_without_files_is_refused_and_the_existing_splits_are_named(folder: Path) -> None:
    jsonl(folder / "test.jsonl", ROWS)
    assert load_error(folder) == (
        "data.split=train: data has only test, by the names of its files. Set data.split=test, or give a file, such as"
        " data.path=data/test.jsonl."
    )


def test_words_that_contain_the_name_of_a_split_name_no_split(folder: Path) -> None:
    jsonl(folder / "latest.jsonl", ROWS[:2])
    jsonl(folder / "valid-ish2trainers.jsonl", ROWS[2:3])
    (folder / "valid-ish2trainers.jsonl").rename(folder / "trainers.jsonl")
    assert answers(folder) == [0, 1, 2]


def test_other_files_beside_json_lines_are_not_read_and_reported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonl(folder / "a.jsonl", ROWS[:2])
    (folder / "statistics.json").write_text("{}")
    (folder / "table.csv").write_text("a,b\n")
    (folder / "notes.txt").write_text("x")
    assert answers(folder) == [0, 1]
    assert "only the .jsonl and .parquet files are read, not statistics.json, table.csv" in capsys.readouterr().err


def test_json_files_of_a_folder_are_read(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps(ROWS[:2]))
    (folder / "b.json").write_text(json.dumps(ROWS[2:4]))
    (folder / "dataset_infos.json").write_text("{}")
    assert answers(folder) == [0, 1, 2, 3]


def test_several_formats_without_json_lines_are_refused(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps(ROWS))
    (folder / "b.csv").write_text("a,b\n")
    message = load_error(folder)
    assert message.startswith("data.path=data: holds files of several formats (a.json, b.csv). Give one file, such as")


def test_a_folder_of_folders_is_refused_and_the_folder_with_data_is_named(folder: Path) -> None:
    (folder / "default" / "train").mkdir(parents=True)
    shutil.copy(jsonl(folder / "a.jsonl", ROWS), folder / "default" / "train" / "a.jsonl")
    (folder / "a.jsonl").unlink()
    assert load_error(folder) == ("data.path=data: holds no data. A folder in it does: data.path=data/default/train.")
