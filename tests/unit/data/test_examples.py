"""Examples: the split, the reuse of tables, the system message, truncation, and errors of the chat template."""

import copy
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_files import REAL_TEXT, ROWS, jsonl, needs_real_text, numbered_rows, numbers_in, prepare, prepare_error

from pipeline.config import ReasoningEffort, RenderingForm, Supervise
from pipeline.data import harmony
from pipeline.data import rows as rows_module
from pipeline.data.harmony import IGNORED

pytestmark = pytest.mark.usefixtures("working_directory")


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
    assert message.startswith(f"data.validation_fraction={fraction} with 10 rows: no row is left to {what}.")


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


# --- tables are reused -----------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls that parse a row, and the calls that render its turns."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: (counted.update([name]), original(*arguments))[1])

    count(rows_module, "parse_conversation")
    count(harmony, "render")
    return counted


def test_a_second_run_reads_and_tokenizes_nothing(calls: Counter[str], tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered_rows(40))
    first = prepare(tokenizer, path)
    assert calls == {"parse_conversation": 40, "render": 40}
    second = prepare(tokenizer, path)
    assert calls == {"parse_conversation": 40, "render": 40}
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
        {"rendering": RenderingForm.template},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_setting_of_the_rendering_changes_only_the_examples(
    changed: dict[str, Any], calls: Counter[str], tokenizer: Any, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered_rows(40))
    prepare(tokenizer, path, max_length=1000)
    prepare(tokenizer, path, **{"max_length": 1000, **changed})
    assert calls == {"parse_conversation": 40, "render": 80}


def test_another_tokenizer_changes_the_examples(calls: Counter[str], tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered_rows(40))
    prepare(tokenizer, path)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["number"])
    assert prepare(other, path).counts["train_tokens"] != prepare(tokenizer, path).counts["train_tokens"]
    assert calls == {"parse_conversation": 40, "render": 80}


# --- the system message ----------------------------------------------------------------------------------------------


def test_language_and_identity_of_the_data_set_are_in_every_prompt(tokenizer: Any, tmp_path: Path) -> None:
    own = {**numbered_rows(1)[0], "reasoning_language": "German"}
    path = jsonl(tmp_path / "a.jsonl", [*numbered_rows(9), own])
    splits = prepare(tokenizer, path, reasoning_language="French", model_identity="You are Ada.", max_length=1000)
    texts = [tokenizer.decode(ids) for part in (splits.train, splits.validation) for ids in part["input_ids"]]
    assert all(text.startswith("<|start|>system<|message|>You are Ada.\n") for text in texts)
    languages = [text.partition("reasoning language: ")[2].partition("<|end|>")[0] for text in texts]
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
    assert message == "data.max_length=10 cuts off every supervised token of the train examples. Raise it."


# --- errors of the chat template -------------------------------------------------------------------------------------


def test_a_row_that_the_template_refuses_is_named_with_file_and_row(tokenizer: Any, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "5?", "thinking": "5", "tool_calls": [{"name": "add", "arguments": {}}]}
    rows = [*ROWS[:9], {"messages": [{"role": "user", "content": "Well?"}, call]}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    message = prepare_error(tokenizer, path, rendering=RenderingForm.template)
    assert "Cannot pass both content and thinking" in message
    assert f"{path}: row 10" in message


def test_a_tool_without_a_description_is_named(tokenizer: Any, tmp_path: Path) -> None:
    rows = [*ROWS[:9], {**ROWS[9], "tools": [{"type": "function", "function": {"name": "add"}}]}]
    assert "'add'" in prepare_error(tokenizer, jsonl(tmp_path / "a.jsonl", rows))


# --- real text -------------------------------------------------------------------------------------------------------


@needs_real_text
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
