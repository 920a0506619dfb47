"""Prompts: which rows they come from, where they end, and which properties a right answer has."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import BlendPartConfig, ColumnsConfig, DataConfig, PipelineConfig, PromptsConfig, Stage
from pipeline.data.examples import split_rows
from pipeline.data.rows import load_rows
from pipeline.errors import UserError
from pipeline.evaluate.generation import prompts
from pipeline.evaluate.generation.prompts import Prompt
from pipeline.runs.run import Run

PROMPT_COLUMN = ColumnsConfig(messages=None, prompt="question")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def row(number: int, **others: Any) -> dict[str, Any]:
    return {"messages": [user(f"question {number}"), {"role": "assistant", "content": f"{number}"}], **others}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    """A configuration with ten rows, three of which are for validation."""
    rows = [row(i, topic=f"topic {i}", level=i) for i in range(10)]
    own = DataConfig(path=write(tmp_path / "rows.jsonl", rows), validation_fraction=0.3)
    return PipelineConfig(stage=Stage.evaluate, run_dir=str(tmp_path / "run"), data=own)


def with_prompts(config: PipelineConfig, **settings: Any) -> PipelineConfig:
    return replace(config, evaluate=replace(config.evaluate, prompts=PromptsConfig(**settings)))


def load_all(config: PipelineConfig, most: int | None = None) -> list[Prompt]:
    run = Run(config)
    return prompts.load(run, config.data, config.evaluate.prompts, load_rows(run, config.data), most)


def load(config: PipelineConfig, **settings: Any) -> list[Prompt]:
    return load_all(with_prompts(config, **settings))


def of_file(config: PipelineConfig, rows: list[Any], **settings: Any) -> list[Prompt]:
    return load(config, path=write(Path(config.run_dir).parent / "asked.jsonl", rows), **settings)


def texts(found: list[Prompt]) -> list[str]:
    return [each.conversation.messages[-1]["content"] for each in found]


def test_by_default_the_prompts_are_the_validation_rows_without_answers(config: PipelineConfig) -> None:
    _, validation = split_rows(config.data, load_rows(Run(config), config.data))
    found = load(config)
    assert len(found) == 3
    assert [each.conversation.messages for each in found] == [each.messages[:-1] for each in validation]


def test_a_prompt_ends_before_the_last_answer(config: PipelineConfig) -> None:
    turns = [user("a"), {"role": "assistant", "thinking": "t", "content": "b"}, user("c")]
    (whole,) = of_file(config, [{"messages": turns}])
    (without_answer,) = of_file(config, [{"messages": [*turns, {"role": "assistant", "content": "d"}]}])
    assert whole.conversation.messages == without_answer.conversation.messages == turns
    assert whole.prompt_id == without_answer.prompt_id


def test_a_prompt_keeps_the_answer_of_the_data_for_reports(config: PipelineConfig) -> None:
    calls = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    tools = [
        {
            "type": "function",
            "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
        }
    ]
    rows = [row(1), {"messages": [user("Hi"), calls], "tools": tools}, {"messages": [user("question 2")]}]
    found = of_file(config, rows)
    assert {text: each.reference for text, each in zip(texts(found), found, strict=True)} == {
        "question 1": "1",
        "Hi": None,
        "question 2": None,
    }
    transcript = prompts.questions(found, 1)[0].transcript("", "length", 0, None)
    assert transcript.reference == found[0].reference


def test_rows_of_another_data_set_need_no_answer(config: PipelineConfig) -> None:
    found = of_file(config, [{"question": "a"}, {"question": "b"}], columns=PROMPT_COLUMN)
    assert sorted(texts(found)) == ["a", "b"]


def test_prompts_have_their_own_filter_and_roles(config: PipelineConfig) -> None:
    rows = [{"messages": [{"role": "human", "content": name}], "kind": name} for name in ("a", "b", "c")]
    found = of_file(config, rows, roles={"human": "user"}, filter={"kind": ["a", "c"]})
    assert sorted(texts(found)) == ["a", "c"]


def test_a_smaller_number_of_prompts_takes_the_first(config: PipelineConfig) -> None:
    rows = [{"question": str(i)} for i in range(20)]
    everything = texts(of_file(config, rows, columns=PROMPT_COLUMN))
    assert sorted(everything) == sorted(str(i) for i in range(20)) and everything != [str(i) for i in range(20)]
    assert texts(of_file(config, rows, columns=PROMPT_COLUMN, max_samples=5)) == everything[:5]
    changed = with_prompts(config, path=str(Path(config.run_dir).parent / "asked.jsonl"), columns=PROMPT_COLUMN)
    assert texts(load_all(changed, most=3)) == everything[:3]


def test_an_id_depends_on_the_contents_only(config: PipelineConfig) -> None:
    rows = [{"question": "a"}, {"question": "b"}]
    ids = {each.prompt_id for each in of_file(config, rows, columns=PROMPT_COLUMN)}
    again = {each.prompt_id for each in of_file(config, [*reversed(rows), {"question": "c"}], columns=PROMPT_COLUMN)}
    assert len(ids) == 2 and len(again) == 3 and ids < again


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{"name": "add", "description": "Adds."}]},
        {"reasoning_effort": "high"},
        {"reasoning_language": "German"},
        {"messages": [user("b")]},
    ],
)
def test_an_id_changes_with_everything_that_the_model_sees(config: PipelineConfig, change: dict[str, Any]) -> None:
    before, after = (of_file(config, [{"messages": [user("a")], **change}])[0] for change in ({}, change))
    assert before.prompt_id != after.prompt_id


def test_a_duplicate_is_asked_once_and_reported(config: PipelineConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(of_file(config, [{"question": "a"}] * 3 + [{"question": "b"}], columns=PROMPT_COLUMN)) == 2
    assert "2 of 4 prompts are duplicates, each is asked only once" in capsys.readouterr().out


def test_expected_properties_come_from_the_columns(config: PipelineConfig) -> None:
    found = load(config, expected={"category": "topic", "answer": "level"}, expected_of_all={"safety": "safe"})
    for each in found:
        number = each.conversation.messages[0]["content"].split()[-1]
        assert each.expected == {"category": f"topic {number}", "answer": number, "safety": "safe"}


def test_expected_properties_do_not_change_the_validation_rows(config: PipelineConfig) -> None:
    assert texts(load(config)) == texts(load(config, expected={"category": "topic"}))


def test_a_prompts_own_language_is_expected_without_a_column(config: PipelineConfig) -> None:
    rows = [
        {"messages": [user("a")], "reasoning_language": "French"},
        {"messages": [{"role": "system", "content": "reasoning language: German\n\nBe brief."}, user("b")]},
        {"messages": [user("c")]},
    ]
    assert {texts([p])[0]: p.expected for p in of_file(config, rows)} == {
        "a": {"language": "French"},
        "b": {"language": "German"},
        "c": {},
    }
    by_setting = replace(config, data=replace(config.data, reasoning_language="Italian"))
    found = {texts([p])[0]: p for p in of_file(by_setting, rows)}
    assert [found[name].expected["language"] for name in "abc"] == ["French", "German", "Italian"]
    assert found["c"].conversation.messages[0] == {"role": "system", "content": "reasoning language: Italian"}


def test_a_column_takes_precedence_over_the_prompts_language(config: PipelineConfig) -> None:
    rows = [{"messages": [user("a")], "reasoning_language": "French", "wanted": "de"}]
    assert of_file(config, rows, expected={"language": "wanted"})[0].expected == {"language": "de"}


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_a_row_without_an_expected_property_is_an_error_with_its_place(config: PipelineConfig) -> None:
    rows = [{"question": "a", "topic": "t"}, {"question": "b", "topic": None}, {"question": "c", "topic": ["t"]}]
    with pytest.raises(UserError) as caught:
        of_file(config, rows, columns=PROMPT_COLUMN, expected={"category": "topic"})
    message = str(caught.value)
    assert "asked.jsonl: row 2: 'topic', which evaluate.prompts.expected.category names, is not there." in message
    assert (
        "row 3: 'topic', which evaluate.prompts.expected.category names, is a list, neither text nor a number."
        in message
    )
    assert "row 1" not in message


def test_a_column_that_no_row_has_is_one_error_with_its_setting(config: PipelineConfig) -> None:
    with pytest.raises(UserError) as caught:
        load(config, expected={"category": "topik"})
    message = str(caught.value)
    assert "evaluate.prompts.expected.category='topik': no row of" in message and "Did you mean 'topic'?" in message
    assert "\n" not in message


def test_a_part_of_a_blend_without_the_column_is_named(config: PipelineConfig, tmp_path: Path) -> None:
    parts = [
        BlendPartConfig(path=write(tmp_path / f"{name}.jsonl", [row(i, **{name: "x"}) for i in range(4)]), weight=1)
        for name in ("topic", "other")
    ]
    blend = replace(config, data=replace(config.data, path=None, blend=parts))
    with pytest.raises(UserError, match=r"no row of \S+other\.jsonl has that column"):
        load(blend, expected={"category": "topic"})


def test_without_a_prompt_there_is_an_error(config: PipelineConfig) -> None:
    with pytest.raises(UserError, match=r"^evaluate\.prompts\.path=\S+: the data set is empty\.$"):
        of_file(config, [])
    with pytest.raises(UserError, match=r"^evaluate\.prompts\.filter=.*: keeps not the only row\.$"):
        of_file(config, [{"messages": [user("a")], "kind": "b"}], filter={"kind": ["c"]})


def test_a_row_with_only_instructions_is_an_error(config: PipelineConfig) -> None:
    with pytest.raises(UserError, match="row 1: has only instructions and no user message"):
        of_file(config, [{"messages": [{"role": "system", "content": "Be brief."}]}])


def test_a_file_that_is_not_there_is_named_with_its_setting(config: PipelineConfig) -> None:
    with pytest.raises(UserError, match=r"^evaluate\.prompts\.path=nowhere\.jsonl: no such file or folder\.$"):
        load(config, path="nowhere.jsonl")
