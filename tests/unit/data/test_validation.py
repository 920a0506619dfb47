"""Validation rows of one's own: no rows are held out, and the rows pass the same checks and rendering."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_files import (
    blend,
    config_of,
    jsonl,
    load,
    load_error,
    numbered_rows,
    numbers_in,
    prepare,
    prepare_error,
)

from pipeline.config import (
    BlendPartConfig,
    ColumnsConfig,
    DataConfig,
    EvaluateConfig,
    ReasoningEffort,
    ValidationConfig,
)
from pipeline.data.examples import split_rows
from pipeline.data.sources import data_sources
from pipeline.errors import UserError
from pipeline.evaluate import groups
from pipeline.evaluate.generation import prompts
from pipeline.runs.run import Run

ROWS = numbered_rows(30)

pytestmark = pytest.mark.usefixtures("working_directory")


@pytest.fixture
def train() -> Path:
    return jsonl(Path("train.jsonl"), ROWS[:20])


@pytest.fixture
def own() -> ValidationConfig:
    return ValidationConfig(path=str(jsonl(Path("own.jsonl"), ROWS[20:])))


def test_no_row_is_held_out_and_all_own_rows_validate(tokenizer: Any, train: Path, own: ValidationConfig) -> None:
    splits = prepare(tokenizer, train, validation=own)
    assert sorted(numbers_in(tokenizer, splits.train)) == list(range(20))
    assert sorted(numbers_in(tokenizer, splits.validation)) == list(range(20, 30))
    assert (splits.counts["train_rows"], splits.counts["validation_rows"]) == (20, 10)
    assert splits.validation_rows.tolist() == numbers_in(tokenizer, splits.validation)


def test_own_rows_are_in_an_order_that_the_seed_decides(tokenizer: Any, train: Path, own: ValidationConfig) -> None:
    first, again, other = (
        numbers_in(tokenizer, prepare(tokenizer, train, validation=own, seed=seed).validation) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_max_samples_limits_only_the_training_rows(tokenizer: Any, train: Path, own: ValidationConfig) -> None:
    splits = prepare(tokenizer, train, validation=own, max_samples=7)
    assert (splits.counts["train_rows"], splits.counts["validation_rows"]) == (7, 10)


def test_the_split_of_a_saved_data_set_validates(tokenizer: Any) -> None:
    parts = {"train": datasets.Dataset.from_list(ROWS[:20]), "test": datasets.Dataset.from_list(ROWS[20:])}
    datasets.DatasetDict(parts).save_to_disk("saved")
    splits = prepare(tokenizer, "saved", validation=ValidationConfig(split="test"))
    assert sorted(numbers_in(tokenizer, splits.validation)) == list(range(20, 30))


def test_the_files_of_a_split_in_a_folder_validate(tokenizer: Any) -> None:
    Path("folder").mkdir()
    jsonl(Path("folder/train.jsonl"), ROWS[:20])
    jsonl(Path("folder/dev.jsonl"), ROWS[20:])
    splits = prepare(tokenizer, "folder", validation=ValidationConfig(split="validation"))
    assert sorted(numbers_in(tokenizer, splits.validation)) == list(range(20, 30))


def test_own_rows_may_have_other_columns_and_inherit_the_rest(tokenizer: Any, train: Path) -> None:
    rows = [{"q": f"number {i}.", "a": f"number {i}."} for i in range(20, 30)]
    columns = ColumnsConfig(messages=None, prompt="q", completion="a")
    path = str(jsonl(Path("own.jsonl"), rows))
    own = ValidationConfig(path=path, columns=columns, reasoning_effort=ReasoningEffort.low)
    splits = prepare(tokenizer, train, validation=own, max_length=1000)
    efforts = {"Reasoning: low" in tokenizer.decode(ids) for ids in splits.validation["input_ids"]}
    assert efforts == {True}
    assert not any("Reasoning: low" in tokenizer.decode(ids) for ids in splits.train["input_ids"])


def test_own_rows_validate_a_blend(tokenizer: Any, own: ValidationConfig) -> None:
    paths = [str(jsonl(Path(f"{name}.jsonl"), ROWS[i : i + 10])) for name, i in (("a", 0), ("b", 10))]
    parts = blend(*(BlendPartConfig(path=path, weight=1) for path in paths))
    splits = prepare(tokenizer, None, blend=parts, validation=own)
    assert sorted(numbers_in(tokenizer, splits.train)) == list(range(20))
    assert splits.counts["data.blend[0].rows"] == 10


def test_bad_rows_of_both_data_sets_are_reported_together(train: Path) -> None:
    bad = [{"messages": [{"role": "user", "content": "x"}]}] * 3
    jsonl(train, [*ROWS[:20], {}])
    lines = load_error(train, validation=ValidationConfig(path=str(jsonl(Path("own.jsonl"), bad)))).splitlines()
    assert lines[1].startswith("  - train.jsonl: row 21: has no 'messages'")
    assert lines[2] == "  - own.jsonl: 3 rows (1, 2 and 3) have no assistant message: there is nothing to learn."


def test_a_missing_data_set_is_named_with_its_setting(train: Path) -> None:
    message = load_error(train, validation=ValidationConfig(path="nowhere.jsonl"))
    assert message == "data.validation.path=nowhere.jsonl: no such file or folder."


def test_the_training_rows_are_refused_under_another_name(train: Path) -> None:
    copy = jsonl(Path("copy.jsonl"), ROWS[:20])
    message = load_error(train, validation=ValidationConfig(path=str(copy)))
    assert message.startswith("data.validation: its 20 rows are the training rows of data.path=train.jsonl.")
    assert load_error(train, validation=ValidationConfig(split="test")).startswith(
        "data.validation: its 20 rows are the"
    )


def test_own_rows_that_are_cut_off_are_an_error(tokenizer: Any, train: Path) -> None:
    long = [{"messages": [{"role": "user", "content": "word " * 3000}, {"role": "assistant", "content": "x"}]}]
    own = ValidationConfig(path=str(jsonl(Path("own.jsonl"), long)))
    message = prepare_error(tokenizer, train, validation=own, max_length=1000)
    assert message == "data.max_length=1000 cuts off every supervised token of the validation examples. Raise it."


def test_prompts_that_are_also_trained_on_are_counted_and_reported(
    tokenizer: Any, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = {"messages": [{"role": "user", "content": " Number 3 "}, {"role": "assistant", "content": "another"}]}
    own = ValidationConfig(path=str(jsonl(Path("own.jsonl"), [*ROWS[20:], again])))
    splits = prepare(tokenizer, train, validation=own)
    assert splits.counts["validation_rows_with_training_prompts"] == 1
    assert "1 of 11 rows of data.validation have a prompt that is also in the training rows" in capsys.readouterr().err


def test_changed_validation_rows_change_the_fingerprint(train: Path, own: ValidationConfig) -> None:
    config = config_of(train, validation=own)
    before = load(config).fingerprint
    jsonl(Path("own.jsonl"), ROWS[20:29])
    assert load(config).fingerprint != before
    jsonl(Path("own.jsonl"), ROWS[20:])
    assert load(config).fingerprint == before


def test_the_fingerprint_tells_training_rows_from_validation_rows() -> None:
    def fingerprint(count: int) -> str:
        train, own = jsonl(Path("train.jsonl"), ROWS[:count]), jsonl(Path("own.jsonl"), ROWS[count:])
        return load(config_of(train, validation=ValidationConfig(path=str(own)))).fingerprint

    whole = load(config_of(jsonl(Path("whole.jsonl"), ROWS))).fingerprint
    assert len({fingerprint(10), fingerprint(20), whole}) == 3


def test_scorers_and_groups_need_their_columns_in_the_validation_rows_alone(train: Path) -> None:
    own = jsonl(Path("own.jsonl"), [{**row, "topic": f"t{i % 2}"} for i, row in enumerate(ROWS[20:])])
    config = config_of(train, validation=ValidationConfig(path=str(own)))
    run, rows = Run(config), load(config)
    evaluate = EvaluateConfig()
    evaluate.prompts.expected = {"category": "topic"}
    asked = prompts.load(run, config.data, evaluate.prompts, rows)
    assert {prompt.expected["category"] for prompt in asked} == {"t0", "t1"}
    assert len(asked) == 10
    _, validation = split_rows(config.data, rows)
    numbers = [int(json.loads(json.dumps(row.messages))[0]["content"].split()[1].strip(".")) for row in validation]
    found = groups.group_examples(run, config.data, "topic", rows=rows, numbers=numbers)  # type: ignore[arg-type]
    assert found == [f"t{number % 2}" for number in numbers]


def revisions(data: DataConfig) -> list[str | None]:
    return [source.data.revision for source in data_sources(data)]


def test_validation_rows_of_another_path_do_not_take_the_revision_of_the_training_rows() -> None:
    def with_own(**settings: Any) -> DataConfig:
        return DataConfig(path="owner/name", revision="v2", validation=ValidationConfig(**settings))

    assert revisions(with_own(path="owner/other")) == ["v2", None]
    assert revisions(with_own(path="owner/other", revision="v3")) == ["v2", "v3"]
    assert revisions(with_own(split="test")) == ["v2", "v2"]
    assert revisions(with_own(path="owner/name", split="test")) == ["v2", "v2"]


def test_a_revision_for_a_whole_blend_is_refused() -> None:
    parts = [BlendPartConfig("owner/a", 1, revision="v1"), BlendPartConfig("owner/b", 1)]
    assert revisions(DataConfig(blend=parts)) == ["v1", None]
    with pytest.raises(UserError, match=r"data\.revision='v2': belongs to data\.path"):
        data_sources(DataConfig(revision="v2", blend=parts))
