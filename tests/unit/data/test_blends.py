"""Blends: the shares of their parts, their settings, and errors in them."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_files import (
    ROWS,
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

from pipeline.config import BlendPartConfig, ColumnsConfig, ReasoningEffort
from pipeline.data.examples import Splits

pytestmark = pytest.mark.usefixtures("working_directory")


def parts_of(tokenizer: Any, splits: Splits) -> Counter[str]:
    """Count the examples from file `a` and from file `b`. The numbers in `b` begin at 1000."""
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
    assert message.startswith("data.blend[1].weight=1: this part would get none of the 100 rows.")


def test_the_fingerprint_changes_with_the_borders_between_the_parts(tmp_path: Path) -> None:
    rows = numbered_rows(10)
    found = set()
    for border in (4, 5):
        halves = (
            jsonl(tmp_path / f"a{border}.jsonl", rows[:border]),
            jsonl(tmp_path / f"b{border}.jsonl", rows[border:]),
        )
        found.add(load(config_of(None, blend=blend(*(BlendPartConfig(str(half), 1) for half in halves)))).fingerprint)
    assert len(found) == 2
