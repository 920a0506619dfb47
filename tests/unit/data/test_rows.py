"""Rows of data sets: every supported form, errors in them, and the fingerprint of their contents."""

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from data_files import ROWS, blend, config_of, conversations, jsonl, load, load_error, parquet

from pipeline.config import BlendPartConfig, ModelConfig, PipelineConfig, Stage
from pipeline.data.parsing import parse_conversation
from pipeline.errors import UserError

GOOD = json.dumps(ROWS[1])


pytestmark = pytest.mark.usefixtures("working_directory")


# --- forms of a data set ---------------------------------------------------------------------------------------------


def write_folder(path: Path) -> Path:
    path.mkdir()
    jsonl(path / "a.jsonl", ROWS[:7])
    parquet(path / "b.parquet", ROWS[7:])
    (path / "README.md").write_text("not data")
    return path


def write_saved(path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


def write_saved_dictionary(path: Path) -> Path:
    parts = {"test": datasets.Dataset.from_list(ROWS[:3]), "train": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(parts).save_to_disk(str(path))
    return path


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def as_csv(rows: list[Any]) -> str:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerows([["messages"], *([json.dumps(row["messages"])] for row in rows)])
    return file.getvalue()


FORMS: dict[str, Callable[[Path], Path]] = {
    "jsonl": lambda path: jsonl(path.with_suffix(".jsonl"), ROWS),
    "json": lambda path: written(path.with_suffix(".json"), json.dumps(ROWS)),
    "indented json": lambda path: written(path.with_suffix(".json"), json.dumps(ROWS, indent=2)),
    "json lines named json": lambda path: written(path.with_suffix(".json"), jsonl(path, ROWS).read_text()),
    "a list in an object": lambda path: written(path.with_suffix(".json"), json.dumps({"version": 1, "data": ROWS})),
    "a list of each split": lambda path: written(path.with_suffix(".json"), json.dumps({"test": [{}], "train": ROWS})),
    "csv with messages as JSON": lambda path: written(path.with_suffix(".csv"), as_csv(ROWS)),
    "parquet": lambda path: parquet(path.with_suffix(".parquet"), ROWS),
    "folder": write_folder,
    "saved": write_saved,
    "saved dictionary": write_saved_dictionary,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_conversations(form: str, tmp_path: Path) -> None:
    assert conversations(FORMS[form](tmp_path / "data")) == [parse_conversation(row) for row in ROWS]


def test_the_synthetic_data_set_gives_its_rows() -> None:
    found = conversations("synthetic://arithmetic")
    assert found[: len(ROWS)] == [parse_conversation(row) for row in ROWS]


def test_a_hub_data_set_is_loaded_with_its_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, **options: Any) -> datasets.Dataset:
        asked.append((path, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = conversations("owner/name", split="validation", revision="abc")
    assert found == [parse_conversation(row) for row in ROWS]
    assert asked == [("owner/name", {"split": "validation", "revision": "abc", "streaming": False})]


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace the Hub by a fake that streams ROWS. The list holds the requests to the fake."""
    asked: list[Any] = []

    def load_dataset(path: str, **options: Any) -> Any:
        asked.append((path, options))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    def dataset_info(path: str, revision: str | None) -> Any:
        asked.append(revision)
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "dataset_info", dataset_info)
    return asked


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_streamed_data_set_is_read_once_at_the_commit_of_its_revision(revision: str | None, hub: list[Any]) -> None:
    for _ in range(2):
        found = conversations("owner/name", streaming=True, revision=revision)
        assert found == [parse_conversation(row) for row in ROWS]
    streamed = ("owner/name", {"split": "train", "revision": COMMIT, "streaming": True})
    assert hub == [revision, streamed, revision]


def test_a_streamed_data_set_at_a_commit_is_requested_once(hub: list[Any]) -> None:
    for _ in range(2):
        conversations("owner/name", streaming=True, revision=COMMIT)
    assert hub == [("owner/name", {"split": "train", "revision": COMMIT, "streaming": True})]


def test_a_hub_that_stops_sending_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[Any]:
        yield ROWS[0]
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    message = load_error("owner/name", streaming=True, revision=COMMIT)
    assert message.startswith(
        "data.path=owner/name: the hub stopped sending rows (reset by peer). Run the same command"
    )


def test_the_split_of_a_saved_dictionary_can_be_chosen(tmp_path: Path) -> None:
    assert conversations(write_saved_dictionary(tmp_path / "data"), split="test") == [
        parse_conversation(row) for row in ROWS[:3]
    ]


TOOL_ROW = {
    "tools": [
        {
            "name": "convert",
            "description": "Converts money.",
            "parameters": {
                "type": "object",
                "properties": {"amount": {"type": "integer"}, "to": {"type": "string", "default": "EUR"}},
            },
        },
        {
            "name": "weather",
            "description": "Looks outside.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    ],
    "messages": [
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "convert", "arguments": {"amount": 1}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]},
        {"role": "tool", "content": "dry"},
        {"role": "assistant", "content": "2, dry."},
    ],
}


def test_tools_in_json_text_are_the_same_in_every_form(tmp_path: Path) -> None:
    row = json.loads(json.dumps(TOOL_ROW))
    row["tools"] = json.dumps(row["tools"])
    for message in row["messages"]:
        for call in message.get("tool_calls", []):
            call["arguments"] = json.dumps(call["arguments"])
    expected = [parse_conversation(TOOL_ROW)]
    assert conversations(jsonl(tmp_path / "a.jsonl", [row])) == expected
    assert conversations(parquet(tmp_path / "b.parquet", [row])) == expected


def test_tools_in_objects_are_the_same_in_every_form(tmp_path: Path) -> None:
    expected = conversations(jsonl(tmp_path / "a.jsonl", [TOOL_ROW]))
    assert conversations(parquet(tmp_path / "b.parquet", [TOOL_ROW])) == expected


def test_unused_columns_and_message_keys_are_ignored(tmp_path: Path) -> None:
    row = {**ROWS[1], "id": 7, "messages": [{**message, "name": "x"} for message in ROWS[1]["messages"]]}
    assert conversations(jsonl(tmp_path / "a.jsonl", [row])) == [parse_conversation(ROWS[1])]


def test_joined_instructions_are_counted_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [{"role": "system", "content": "One."}, {"role": "developer", "content": "Two."}]
    rows = [ROWS[0], *({"messages": [*both, *row["messages"]]} for row in ROWS[1:3])]
    load(config_of(jsonl(tmp_path / "a.jsonl", rows)))
    assert "[data] 2 rows have a system and a developer message: joined" in capsys.readouterr().out


# --- mistakes in a data set ------------------------------------------------------------------------------------------

BAD_LINES = {
    "broken JSON": ('{"messages": [', "not valid JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', "not in UTF-8 ('utf-8' codec can't decode byte 0xff"),
    "Latin-1": (
        '{"messages": "é"}'.encode("latin-1"),
        "If the file is in Latin-1, convert it (iconv -f LATIN1 -t UTF-8 ",
    ),
    "not an object": ("[1]", "is a list, not an object with 'messages'"),
    "no messages": ('{"text": "hi"}', "has no 'messages' (it has: text)"),
    "unknown role": (
        '{"messages": [{"role": "bot", "content": "x"}]}',
        "messages[0] has the unknown role 'bot'; roles are system, developer, user, assistant, tool",
    ),
    "no assistant": ('{"messages": [{"role": "user", "content": "x"}]}', "has no assistant message"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_row_is_named_with_file_and_row(line: str | bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    message = load_error(path)
    assert message.startswith(f"{path}: row 2: ")
    assert reason in message


def test_rows_are_counted_as_an_editor_counts_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n\n   \n{{}}\n")
    assert load_error(path).startswith(f"{path}: row 4: ")


def test_a_bad_row_of_a_parquet_file_is_named_with_file_and_row(tmp_path: Path) -> None:
    path = parquet(tmp_path / "rows.parquet", [*ROWS[:2], {"messages": ROWS[2]["messages"][:1]}])
    assert load_error(path) == f"{path}: row 3: has no assistant message: there is nothing to learn."


def test_a_bad_row_in_a_folder_is_named_with_its_own_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    jsonl(folder / "c.jsonl", [ROWS[0], {}])
    assert load_error(folder).startswith(f"{folder / 'c.jsonl'}: row 2: has no 'messages'")


def test_several_bad_rows_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([GOOD, "{", GOOD, "{}", *(line for line, _ in list(BAD_LINES.values())[5:])]))
    message = load_error(path)
    assert message.startswith("4 problems:\n")
    assert [line.partition(": row ")[2][0] for line in message.splitlines()[1:]] == ["2", "4", "5", "6"]


def test_many_rows_with_the_same_problem_are_one_line(tmp_path: Path) -> None:
    message = load_error(jsonl(tmp_path / "rows.jsonl", [{"messages": []}] * 1000))
    assert message == (
        f"{tmp_path / 'rows.jsonl'}: 1000 rows (1, 2, 3 and 997 more): 'messages' is not a list with at least one"
        " message."
    )


def test_bad_rows_of_all_parts_of_a_blend_are_counted(tmp_path: Path) -> None:
    names = [str(jsonl(tmp_path / f"{name}.jsonl", [{"messages": []}] * 20)) for name in "ab"]
    message = load_error(None, blend=blend(*(BlendPartConfig(name, 1) for name in names)))
    assert message.startswith("2 problems:\n")
    assert message.count("20 rows (1, 2, 3 and 17 more)") == 2


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_empty_data_set(content: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert load_error(path) == f"data.path={path}: the data set is empty."


def test_an_empty_parquet_file_is_an_empty_data_set(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS).slice(0, 0), path)
    assert load_error(path) == f"data.path={path}: the data set is empty."


def test_an_empty_saved_data_set_is_an_empty_data_set(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).select([]).save_to_disk(str(path))
    assert str(path) in load_error(path)


@pytest.mark.parametrize("missing", ["state.json", "data-00000-of-00001.arrow"])
def test_a_saved_data_set_with_a_missing_file_is_a_user_error(missing: str, tmp_path: Path) -> None:
    path = write_saved(tmp_path / "saved")
    (path / missing).unlink()
    assert str(path) in load_error(path)


@pytest.mark.parametrize("name", ["/nowhere/rows.jsonl", "nowhere.parquet", "./nowhere", "~/nowhere", "a/b/c"])
def test_a_missing_path_is_named(name: str) -> None:
    assert load_error(name) == f"data.path={name}: no such file or folder."


def test_an_unset_data_path_is_an_error() -> None:
    with pytest.raises(UserError, match=r"data\.path: is not set\. Give data\.path=<file, folder or hub id>"):
        load(PipelineConfig(stage=Stage.sft, model=ModelConfig(path="unused")))


def test_a_file_of_another_kind_is_refused_and_the_supported_kinds_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("role,content\n")
    assert load_error(path) == (
        f"data.path={path}: must be a .jsonl, .json, .csv, .tsv or .parquet file, a folder of such files, or a saved"
        " data set."
    )


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_text("hello")
    assert load_error(path).startswith(f"{path}: not a readable parquet file")


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("role,content\n")
    assert load_error(tmp_path) == (
        f"data.path={tmp_path}: holds no data. The path must be a .jsonl, .json, .csv, .tsv or .parquet file, a folder"
        " of such files, or a saved data set."
    )


def test_a_missing_split_is_refused_and_the_existing_splits_are_named(tmp_path: Path) -> None:
    path = write_saved_dictionary(tmp_path / "data")
    assert load_error(path, split="validation") == f"data.split=validation: {path} has the splits test, train."


def test_an_unknown_synthetic_data_set_is_refused() -> None:
    assert load_error("synthetic://poems") == (
        "data.path='synthetic://poems': no such synthetic data set. Use one of synthetic://arithmetic, synthetic://demo,"
        " synthetic://demo_refusal."
    )


@pytest.mark.parametrize("error", [ConnectionError("no route"), ValueError("Unknown split"), FileNotFoundError("gone")])
def test_a_hub_data_set_that_cannot_be_loaded_is_a_user_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = load_error("owner/name")
    assert message.startswith("data.path='owner/name', data.split='train': no such file or folder, and the hub cannot")
    assert str(error) in message


# --- fingerprint -----------------------------------------------------------------------------------------------------


def test_the_fingerprint_depends_on_the_contents_and_not_on_the_name(tmp_path: Path) -> None:
    first = jsonl(tmp_path / "first.jsonl", ROWS)
    second = Path(shutil.copy(first, tmp_path / "second.jsonl"))
    assert load(config_of(first)).fingerprint == load(config_of(second)).fingerprint


def test_the_fingerprint_of_a_data_set_stays_so_that_finished_stages_stay_up_to_date(tmp_path: Path) -> None:
    found = load(config_of(jsonl(tmp_path / "a.jsonl", ROWS)))
    assert found.fingerprint == "0e7ce2a119762b728f149aade9ccbfaf"


def test_the_fingerprint_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    turned = [{"id": 1, **row} for row in ROWS]
    first = load(config_of(jsonl(tmp_path / "first.jsonl", turned)))
    second = load(config_of(jsonl(tmp_path / "second.jsonl", [{**row, "id": 1} for row in ROWS])))
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        ROWS[:-1],
        ROWS[::-1],
        [*ROWS[:-1], {"messages": [*ROWS[-1]["messages"][:-1], {"role": "assistant", "content": "other"}]}],
        [{**row, "reasoning_effort": "low"} for row in ROWS],
    ],
    ids=["a row less", "another order", "another answer", "another reasoning effort"],
)
def test_the_fingerprint_changes_with_the_contents(changed: list[Any], tmp_path: Path) -> None:
    before = load(config_of(jsonl(tmp_path / "a.jsonl", ROWS))).fingerprint
    assert load(config_of(jsonl(tmp_path / "a.jsonl", changed))).fingerprint != before
