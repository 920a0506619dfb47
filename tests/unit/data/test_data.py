"""Data sets in every supported form, errors in them, the split, and truncation."""

import copy
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from pipeline.config import (
    BlendPartConfig,
    ColumnsConfig,
    DataConfig,
    ModelConfig,
    PipelineConfig,
    ReasoningEffort,
    Stage,
    Supervise,
    TinyConfig,
)
from pipeline.data import rows as rows_module
from pipeline.data import synthetic
from pipeline.data.examples import Splits, prepare_examples
from pipeline.data.harmony import IGNORED, Conversation, parse_conversation
from pipeline.data.rows import Rows, harmony, load_rows
from pipeline.errors import UserError
from pipeline.models import tiny_model
from pipeline.runs.run import Run

ROWS = synthetic.arithmetic_rows()[:20]
GOOD = json.dumps(ROWS[1])
REAL_TEXT = Path(__file__).parents[4] / "shared" / "data" / "mgsm" / "reasoning.jsonl"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer") / "tiny"
    tiny_model.create_tiny(directory, TinyConfig())
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change into a new directory: run_dir is relative here, and tables are written below it."""
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)


def config_of(path: Any, **settings: Any) -> PipelineConfig:
    data = DataConfig(path=None if path is None else str(path), **settings)
    return PipelineConfig(stage=Stage.sft, run_dir="run", model=ModelConfig(path="unused"), data=data)


def load(config: PipelineConfig) -> Rows:
    return load_rows(Run(config), config.data)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, rows: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def conversations(path: Any, **settings: Any) -> list[Conversation]:
    return list(load(config_of(path, **settings)).conversations)


def load_error(path: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(config_of(path, **settings))
    return str(caught.value)


def prepare(tokenizer: Any, path: Any, **settings: Any) -> Splits:
    config = config_of(path, **settings)
    return prepare_examples(Run(config), config.data, load(config), tokenizer)


def prepare_error(tokenizer: Any, path: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        prepare(tokenizer, path, **settings)
    return str(caught.value)


def numbered_rows(count: int, turns: int = 1) -> list[dict[str, Any]]:
    """Make conversations that each have a number of their own in every message."""
    return [
        {
            "messages": [
                {"role": role, "content": f"number {i}."} for _ in range(turns) for role in ("user", "assistant")
            ]
        }
        for i in range(count)
    ]


def numbers_in(tokenizer: Any, part: datasets.Dataset) -> list[int]:
    """Return the number of the conversation of each example."""
    texts = (tokenizer.decode(example["input_ids"]) for example in part)
    return [int(text.rpartition("number ")[2].partition(".")[0]) for text in texts]


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


FORMS: dict[str, Callable[[Path], Path]] = {
    "jsonl": lambda path: jsonl(path.with_suffix(".jsonl"), ROWS),
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
    """Replace the hub by one that streams ROWS. The list holds the requests."""
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
    "not UTF-8": (b'{"messages": "\xff"}', "not valid JSON"),
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
    path.write_text("\n".join([GOOD, "{", GOOD, "{}", *(line for line, _ in list(BAD_LINES.values())[4:])]))
    message = load_error(path)
    assert message.startswith("4 problems:\n")
    assert [line.partition(": row ")[2][0] for line in message.splitlines()[1:]] == ["2", "4", "5", "6"]


def test_the_first_of_many_bad_rows_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    message = load_error(jsonl(tmp_path / "rows.jsonl", [{"messages": []}] * 1000))
    assert len(message.splitlines()) < 12
    assert message.startswith("1000 problems:\n")
    assert "row 1:" in message and "and 992 more" in message


def test_bad_rows_of_all_parts_of_a_blend_are_counted(tmp_path: Path) -> None:
    names = [str(jsonl(tmp_path / f"{name}.jsonl", [{"messages": []}] * 20)) for name in "ab"]
    message = load_error(None, blend=blend(*(BlendPartConfig(name, 1) for name in names)))
    assert message.startswith("40 problems:\n")
    assert message.count("and 12 more") == 2


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
    path = tmp_path / "rows.csv"
    path.write_text("role,content\n")
    assert load_error(path).startswith(f"data.path={path}: must be .jsonl or .parquet")


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_text("hello")
    assert load_error(path).startswith(f"{path}: not a readable parquet file")


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("role,content\n")
    assert load_error(tmp_path) == (
        f"data.path={tmp_path}: holds neither .jsonl nor .parquet files nor a saved data set."
    )


def test_a_missing_split_is_refused_and_the_existing_splits_are_named(tmp_path: Path) -> None:
    path = write_saved_dictionary(tmp_path / "data")
    assert load_error(path, split="validation") == f"data.split=validation: {path} has the splits test, train."


def test_an_unknown_synthetic_data_set_is_refused() -> None:
    assert load_error("synthetic://poems") == (
        "data.path='synthetic://poems': no such synthetic data set. Use synthetic://arithmetic."
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


# --- training and validation -----------------------------------------------------------------------------------------


def test_no_conversation_is_in_both_parts(tokenizer: Any, tmp_path: Path) -> None:
    splits = prepare(tokenizer, jsonl(tmp_path / "a.jsonl", numbered_rows(40, turns=2)), validation_fraction=0.25)
    train, validation = numbers_in(tokenizer, splits.train), numbers_in(tokenizer, splits.validation)
    assert sorted(train + validation) == sorted([*range(40), *range(40)])
    assert not set(train) & set(validation)


def test_every_validation_example_has_the_number_of_its_conversation(tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*numbered_rows(5), *numbered_rows(40, turns=2)[5:]])
    splits = prepare(tokenizer, path, validation_fraction=0.5)
    assert splits.validation_rows.tolist() == numbers_in(tokenizer, splits.validation)
    assert len(splits.validation_rows) > 20


def test_copies_of_a_conversation_are_in_the_same_part(tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered_rows(20) * 2)
    splits = prepare(tokenizer, path, validation_fraction=0.25)
    assert not set(numbers_in(tokenizer, splits.train)) & set(numbers_in(tokenizer, splits.validation))


@pytest.mark.parametrize(("fraction", "held_out"), [(0.1, 4), (0.25, 10), (0.5, 20), (0.03, 1)])
def test_the_validation_part_has_the_configured_size(
    fraction: float, held_out: int, tokenizer: Any, tmp_path: Path
) -> None:
    splits = prepare(tokenizer, jsonl(tmp_path / "a.jsonl", numbered_rows(40)), validation_fraction=fraction)
    assert (len(splits.train), len(splits.validation)) == (40 - held_out, held_out)
    assert splits.counts["train_rows"] == 40 - held_out
    assert splits.counts["validation_rows"] == held_out


def test_the_split_is_the_same_every_time(tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered_rows(40))
    first, second = prepare(tokenizer, path), prepare(tokenizer, path)
    assert first.train["input_ids"] == second.train["input_ids"]
    assert first.validation["input_ids"] == second.validation["input_ids"]


def test_the_split_changes_only_with_the_seed(tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered_rows(40))
    held_out = numbers_in(tokenizer, prepare(tokenizer, path).validation)
    assert numbers_in(tokenizer, prepare(tokenizer, path, seed=1).validation) != held_out
    assert numbers_in(tokenizer, prepare(tokenizer, path, max_length=100).validation) == held_out


def test_max_samples_chooses_that_many_rows_with_the_seed(tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered_rows(40))
    parts = [prepare(tokenizer, path, max_samples=10, seed=seed) for seed in (1, 1, 2)]
    chosen = [sorted(numbers_in(tokenizer, part.train) + numbers_in(tokenizer, part.validation)) for part in parts]
    assert [len(set(numbers)) for numbers in chosen] == [10, 10, 10]
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] != list(range(10))


def test_fewer_rows_than_max_samples_are_all_used_and_reported(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = prepare(tokenizer, jsonl(tmp_path / "a.jsonl", numbered_rows(10)), max_samples=11)
    assert splits.counts["train_rows"] + splits.counts["validation_rows"] == 10
    assert "data.max_samples=11, but there are only 10 rows: using all" in capsys.readouterr().out


@pytest.mark.parametrize(("fraction", "what"), [(0.04, "validate on"), (0.96, "train on")])
def test_a_split_that_leaves_nothing_is_refused(fraction: float, what: str, tokenizer: Any, tmp_path: Path) -> None:
    message = prepare_error(tokenizer, jsonl(tmp_path / "a.jsonl", numbered_rows(10)), validation_fraction=fraction)
    assert message.startswith(f"data.validation_fraction={fraction} of 10 rows leaves none to {what}.")


def test_supervise_last_turn_gives_one_example_for_each_conversation(tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered_rows(10, turns=3))
    assert prepare(tokenizer, path).counts["train_examples"] == 27
    assert prepare(tokenizer, path, supervise=Supervise.last_turn).counts["train_examples"] == 9


def test_reasoning_effort_and_date_of_the_data_set_are_in_every_prompt(tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*numbered_rows(9), {**numbered_rows(1)[0], "reasoning_effort": "low"}])
    splits = prepare(tokenizer, path, conversation_date="2001-02-03", max_length=1000)
    texts = [tokenizer.decode(ids) for part in (splits.train, splits.validation) for ids in part["input_ids"]]
    assert all("\nCurrent date: 2001-02-03\n" in text for text in texts)
    assert sorted(text.partition("Reasoning: ")[2].split()[0] for text in texts) == ["low", *["medium"] * 9]


# --- blends ----------------------------------------------------------------------------------------------------------


def blend(*parts: BlendPartConfig) -> list[BlendPartConfig]:
    return list(parts)


def parts_of(tokenizer: Any, splits: Splits) -> Counter[str]:
    """Count the examples from file `a` and from file `b`, whose numbers begin at 1000."""
    numbers = [*numbers_in(tokenizer, splits.train), *numbers_in(tokenizer, splits.validation)]
    assert len(numbers) == len(set(numbers))
    return Counter("b" if number >= 1000 else "a" for number in numbers)


@pytest.fixture
def two_files(tmp_path: Path) -> tuple[str, str]:
    a = jsonl(tmp_path / "a.jsonl", numbered_rows(100))
    prompts = [{"prompt": f"number {i}.", "completion": f"number {i}."} for i in range(1000, 1030)]
    return str(a), str(jsonl(tmp_path / "b.jsonl", prompts))


PAIR = ColumnsConfig(messages=None, prompt="prompt", completion="completion")


@pytest.mark.parametrize(
    ("weights", "max_samples", "expected"),
    [((1, 1), None, (30, 30)), ((3, 1), None, (90, 30)), ((3, 1), 40, (30, 10)), ((0.9, 0.1), None, (100, 11))],
)
def test_the_weights_of_a_blend_are_shares_of_its_rows(
    weights: tuple[float, float],
    max_samples: int | None,
    expected: tuple[int, int],
    two_files: tuple[str, str],
    tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a, b = two_files
    parts = blend(BlendPartConfig(a, weights[0]), BlendPartConfig(b, weights[1], columns=PAIR))
    splits = prepare(tokenizer, None, blend=parts, max_samples=max_samples)
    assert parts_of(tokenizer, splits) == {"a": expected[0], "b": expected[1]}
    assert splits.counts["data.blend[0].rows"] == expected[0]
    assert splits.counts["data.blend[1].rows"] == expected[1]
    assert splits.counts["train_rows"] + splits.counts["validation_rows"] == sum(expected)
    said = capsys.readouterr().out
    assert f"[data] {a}: {expected[0]} of 100 rows, {expected[0] / sum(expected):.1%} of the blend" in said
    assert f"[data] {b}: {expected[1]} of 30 rows, {expected[1] / sum(expected):.1%} of the blend" in said


def test_a_blend_is_the_same_every_time_and_changes_with_the_seed(two_files: tuple[str, str], tokenizer: Any) -> None:
    parts = blend(BlendPartConfig(two_files[0], 1), BlendPartConfig(two_files[1], 1, columns=PAIR))
    one, same, other = (
        numbers_in(tokenizer, prepare(tokenizer, None, blend=parts, seed=seed).train) for seed in (1, 1, 2)
    )
    assert one == same
    assert set(one) != set(other)


def test_a_part_of_a_blend_inherits_the_settings_that_it_does_not_set(two_files: tuple[str, str]) -> None:
    parts = blend(
        BlendPartConfig(two_files[0], 1, reasoning_effort=ReasoningEffort.low, reasoning_language="French"),
        BlendPartConfig(two_files[1], 1),
    )
    config = config_of(None, blend=parts, columns=PAIR)
    config.data.blend[0].columns = ColumnsConfig()
    found = load(config).conversations
    assert {(one.reasoning_effort, one.reasoning_language) for one in found[:100]} == {("low", "French")}
    assert {(one.reasoning_effort, one.reasoning_language) for one in found[100:]} == {(None, None)}


def test_bad_rows_of_all_parts_are_reported_together(tmp_path: Path) -> None:
    names = [str(jsonl(tmp_path / f"{name}.jsonl", [ROWS[0], {"messages": []}])) for name in "ab"]
    message = load_error(None, blend=blend(*(BlendPartConfig(name, 1) for name in [*names, "nowhere.jsonl"])))
    wrong = "row 2: 'messages' is not a list with at least one message."
    assert message == (
        f"3 problems:\n  - {names[0]}: {wrong}\n  - {names[1]}: {wrong}\n"
        "  - data.blend[2].path=nowhere.jsonl: no such file or folder."
    )


def test_more_rows_than_the_weights_allow_are_reported_as_missing(
    two_files: tuple[str, str], tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = blend(BlendPartConfig(two_files[0], 1), BlendPartConfig(two_files[1], 1, columns=PAIR))
    prepare(tokenizer, None, blend=parts, max_samples=100)
    assert "data.max_samples=100, but with these weights there are only 60 rows: using all" in capsys.readouterr().out


def test_a_part_of_less_than_one_row_is_refused(two_files: tuple[str, str], tokenizer: Any) -> None:
    parts = blend(BlendPartConfig(two_files[0], 1000), BlendPartConfig(two_files[1], 1, columns=PAIR))
    message = prepare_error(tokenizer, None, blend=parts)
    assert message.startswith("data.blend[1].weight=1: less than one row of 100.")


# --- tables are reused -----------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often rows are parsed and turns rendered."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: (counted.update([name]), original(*arguments))[1])

    count(rows_module, "parse_conversation")
    count(harmony, "turns")
    return counted


def test_a_second_run_reads_and_tokenizes_nothing(calls: Counter[str], tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered_rows(40))
    first = prepare(tokenizer, path)
    assert calls == {"parse_conversation": 40, "turns": 40}
    second = prepare(tokenizer, path)
    assert calls == {"parse_conversation": 40, "turns": 40}
    assert first.counts == second.counts
    assert first.train.to_list() == second.train.to_list()


def test_a_changed_file_is_read_again(calls: Counter[str], tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered_rows(40))
    prepare(tokenizer, path)
    times = path.stat()
    path.write_text(path.read_text().replace("number 7.", "number 8."))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    prepare(tokenizer, path)
    assert calls["parse_conversation"] == 80


@pytest.mark.parametrize(
    "changed",
    [
        {"max_length": 999},
        {"seed": 1},
        {"reasoning_effort": ReasoningEffort.low},
        {"reasoning_language": "French"},
        {"model_identity": "You are Ada."},
        {"conversation_date": "2020-01-01"},
        {"supervise": Supervise.last_turn},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_setting_of_the_rendering_changes_only_the_examples(
    changed: dict[str, Any], calls: Counter[str], tokenizer: Any, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered_rows(40))
    prepare(tokenizer, path, max_length=1000)
    prepare(tokenizer, path, **{"max_length": 1000, **changed})
    assert calls == {"parse_conversation": 40, "turns": 80}


def test_another_tokenizer_changes_the_examples(calls: Counter[str], tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered_rows(40))
    prepare(tokenizer, path)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["number"])
    assert prepare(other, path).counts["train_tokens"] != prepare(tokenizer, path).counts["train_tokens"]
    assert calls == {"parse_conversation": 40, "turns": 80}


# --- the system message ----------------------------------------------------------------------------------------------


def test_language_and_identity_of_the_data_set_are_in_every_prompt(tokenizer: Any, tmp_path: Path) -> None:
    own = {**numbered_rows(1)[0], "reasoning_language": "German"}
    path = jsonl(tmp_path / "a.jsonl", [*numbered_rows(9), own])
    splits = prepare(tokenizer, path, reasoning_language="French", model_identity="You are Ada.", max_length=1000)
    texts = [tokenizer.decode(ids) for part in (splits.train, splits.validation) for ids in part["input_ids"]]
    assert all(text.startswith("<|start|>system<|message|>You are Ada.\n") for text in texts)
    languages = [text.partition("reasoning language: ")[2].split()[0] for text in texts]
    assert Counter(languages) == {"French": 9, "German": 1}


# --- length ----------------------------------------------------------------------------------------------------------


def uneven_rows() -> list[dict[str, Any]]:
    """Make short rows, rows with a long answer, and rows with a long question."""
    words = "word " * 200
    texts = [("hi", "ho"), ("hi", words), (words, "ho")] * 4
    return [
        {"messages": [{"role": "user", "content": f"{i} {question}"}, {"role": "assistant", "content": answer}]}
        for i, (question, answer) in enumerate(texts)
    ]


def test_examples_longer_than_max_length_are_truncated_counted_and_reported(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", uneven_rows())
    whole = prepare(tokenizer, path, validation_fraction=0.5, max_length=10_000)
    assert whole.counts["train_examples_cut"] == whole.counts["validation_examples_cut"] == 0
    assert capsys.readouterr().err == ""
    cut = prepare(tokenizer, path, validation_fraction=0.5, max_length=150)
    said = capsys.readouterr().err
    for name, before, after in (
        ("train", whole.train, cut.train),
        ("validation", whole.validation, cut.validation),
    ):
        expected = [{key: ids[:150] for key, ids in example.items()} for example in before]
        kept = [example for example in expected if set(example["labels"]) != {IGNORED}]
        longer = sum(len(example["input_ids"]) > 150 for example in before)
        left_out = len(expected) - len(kept)
        assert 0 < left_out < longer < len(expected)
        assert after.to_list() == kept
        assert cut.counts[f"{name}_examples"] == len(kept)
        assert cut.counts[f"{name}_examples_cut"] == longer
        assert cut.counts[f"{name}_examples_left_out"] == left_out
        assert cut.counts[f"{name}_tokens"] == sum(len(example["input_ids"]) for example in kept)
        assert (
            f"[data] warning: {longer} of {len(expected)} {name} examples are longer than data.max_length=150 and were"
            f" truncated; {left_out} of them had no supervised token left and were dropped\n"
        ) in said


def test_truncation_removes_the_end_of_the_answer_and_its_stop_token_first(tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS[1:5])
    whole = prepare(tokenizer, path, validation_fraction=0.5).train[0]
    length = len(whole["input_ids"])
    (cut, *_) = prepare(tokenizer, path, validation_fraction=0.5, max_length=length - 1).train
    assert tokenizer.decode(whole["input_ids"][-1]) == "<|return|>"
    assert cut == {key: ids[:-1] for key, ids in whole.items()}


@pytest.mark.parametrize("supervise", Supervise)
def test_early_turns_of_a_long_conversation_survive_truncation_unless_only_the_last_is_trained(
    supervise: Supervise, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [*numbered_rows(10), {"messages": numbered_rows(12, turns=6)[11]["messages"]}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    whole = prepare(tokenizer, path, supervise=supervise)
    first_turns = numbers_in(tokenizer, whole.train) + numbers_in(tokenizer, whole.validation)
    assert first_turns.count(11) == (6 if supervise is Supervise.every_turn else 1)
    shortest = len(whole.train[0]["input_ids"])
    cut = prepare(tokenizer, path, supervise=supervise, max_length=shortest + 20)
    kept = numbers_in(tokenizer, cut.train) + numbers_in(tokenizer, cut.validation)
    left_out = cut.counts["train_examples_left_out"] + cut.counts["validation_examples_left_out"]
    assert kept.count(11) == first_turns.count(11) - left_out
    assert 0 < kept.count(11) < 6 if supervise is Supervise.every_turn else kept.count(11) == 0


def test_supervised_tokens_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    splits = prepare(tokenizer, jsonl(tmp_path / "a.jsonl", numbered_rows(10)))
    for name, part in (("train", splits.train), ("validation", splits.validation)):
        supervised = sum(label != IGNORED for labels in part["labels"] for label in labels)
        assert splits.counts[f"{name}_supervised_tokens"] == supervised > 0


def test_a_max_length_that_truncates_every_supervised_token_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    message = prepare_error(tokenizer, jsonl(tmp_path / "a.jsonl", ROWS), max_length=10)
    assert message == "data.max_length=10 truncates every supervised token of the train examples. Raise it."


# --- errors of the chat template -------------------------------------------------------------------------------------


def test_a_row_that_the_template_refuses_is_named_with_file_and_row(tokenizer: Any, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {}}]}
    tool = {"role": "tool", "content": "5"}
    answer = {"role": "assistant", "content": "5"}
    rows = [*ROWS[:9], {"messages": [{"role": "user", "content": "Well?"}, call, tool, answer, tool, answer]}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    message = prepare_error(tokenizer, path)
    assert "no previous assistant message with a tool call" in message
    assert f"{path}: row 10" in message


def test_a_tool_without_a_description_is_named(tokenizer: Any, tmp_path: Path) -> None:
    rows = [*ROWS[:9], {**ROWS[9], "tools": [{"type": "function", "function": {"name": "add"}}]}]
    assert "'add'" in prepare_error(tokenizer, jsonl(tmp_path / "a.jsonl", rows))


# --- real text -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_TEXT.is_file(), reason=f"{REAL_TEXT} is missing")
def test_real_text_in_many_languages_is_unchanged(tokenizer: Any) -> None:
    rows = [json.loads(line) for line in REAL_TEXT.read_text(encoding="utf-8").splitlines()]
    splits = prepare(tokenizer, REAL_TEXT)
    found = [example for part in (splits.train, splits.validation) for example in part]
    completions = [tokenizer.decode([label for label in example["labels"] if label != IGNORED]) for example in found]
    expected = [
        f"<|channel|>analysis<|message|>{row['messages'][-1]['thinking']}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{row['messages'][-1]['content']}<|return|>"
        for row in rows
    ]
    assert sorted(completions) == sorted(expected)
