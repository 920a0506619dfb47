"""Rows with the same prompt are found, and the split into training and validation rows keeps them together."""

import random
from pathlib import Path
from typing import Any

import pytest
from data_files import config_of, jsonl, load, numbered_rows

from pipeline.config import DataConfig
from pipeline.data import prompts, synthetic
from pipeline.data.examples import split_rows
from pipeline.data.parsing import parse_conversation
from pipeline.errors import UserError

pytestmark = pytest.mark.usefixtures("working_directory")


def turns(*texts: str) -> dict[str, Any]:
    """Make a conversation: user and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def normalized(*texts: str) -> str:
    return prompts.normalize(parse_conversation(turns(*texts), needs_answer=False))


@pytest.mark.parametrize(
    "other",
    [
        ("What is 2 + 2?", "Another answer."),
        ("  What\tis\n2 + 2 ?  ", "4"),
        ("what is 2 + 2", "4"),
        ("What is 2 + 2?", "4", "And 3 more?", "7"),
        ("What is 2 + 2?",),
    ],
)
def test_a_question_that_is_asked_again_is_the_same_prompt(other: tuple[str, ...]) -> None:
    assert normalized("What is 2 + 2?", "4") == normalized(*other)


@pytest.mark.parametrize("other", ["What is 2 + 3?", "What is 22?", "What is 2.5 + 2?"])
def test_another_question_is_another_prompt(other: str) -> None:
    assert normalized("What is 2 + 2?", "4") != normalized(other, "4")


def test_other_instructions_make_another_prompt() -> None:
    row = turns("Hi?", "Hello.")
    with_system = {"messages": [{"role": "system", "content": "Be kind."}, *row["messages"]]}
    assert prompts.normalize(parse_conversation(row)) != prompts.normalize(parse_conversation(with_system))


def split(rows: list[dict[str, Any]], **settings: Any) -> tuple[list[str], list[str]]:
    """Split rows, and return the normalized prompts of the training and of the validation rows."""
    config = config_of(jsonl(Path("rows.jsonl"), rows), **settings)
    return tuple([prompts.normalize(row) for row in part] for part in split_rows(config.data, load(config)))  # type: ignore[return-value]


def asked_again() -> list[dict[str, Any]]:
    """Ask 60 questions once to six times: with other answers and other white space, and in longer chats."""
    forms = [
        lambda i: turns(f"What is {i}?", f"answer {i}"),
        lambda i: turns(f"What is  {i} ?", f"another answer {i}"),
        lambda i: turns(f"what is {i}?", f"answer {i}", "More?", "No."),
    ]
    rows = [forms[k % 3](i) for i in range(60) for k in range(1 + i % 6)]
    random.Random(0).shuffle(rows)
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_equal_prompts_are_on_the_same_side_and_the_share_is_met(seed: int) -> None:
    train, validation = split(asked_again(), validation_fraction=0.2, seed=seed)
    assert not {*train} & {*validation}
    assert abs(len(validation) - 0.2 * len(asked_again())) <= 3
    assert (train, validation) == split(asked_again(), validation_fraction=0.2, seed=seed)


def test_the_seed_decides_which_prompts_validate() -> None:
    assert split(asked_again(), seed=1) != split(asked_again(), seed=2)


def test_the_synthetic_data_repeat_prompts_and_are_split_by_them() -> None:
    """So the split of recipe=smoke depends on prompts."""
    train, validation = split(synthetic.arithmetic_rows()[:400])
    assert len({*train}) < len(train)
    assert not {*train} & {*validation}


def test_rows_that_all_have_the_same_prompt_cannot_be_split() -> None:
    with pytest.raises(UserError) as caught:
        split([turns("Tell a joke.", f"joke {i}") for i in range(30)])
    assert str(caught.value) == (
        "data.validation_fraction=0.1 with 30 rows: no row is left to validate on. They have 1 different prompts, and"
        " equal prompts stay together. Change it, use more rows, or set data.validation.path."
    )


def fingerprint(rows: list[dict[str, Any]]) -> str:
    return load(config_of(jsonl(Path("rows.jsonl"), rows))).fingerprint


def test_runs_that_were_split_by_row_are_made_anew_only_if_prompts_are_repeated() -> None:
    """The two fingerprints were recorded when the split kept only equal rows together."""
    assert fingerprint(numbered_rows(10)) == "a6775bd475c7a97324d2c889a2adf61e"
    assert fingerprint([*numbered_rows(10), numbered_rows(10)[1]]) != "15ca6b97d30ba8700913393e9ac372e6"


def test_a_data_config_holds_out_rows_by_default() -> None:
    assert not DataConfig().validation.is_set
