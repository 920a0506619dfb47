"""Every file in conf/data/ reads hand-made rows of its data set. Rows of another form are errors."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from omegaconf import OmegaConf

from pipeline.config import ColumnsConfig, DataConfig, ModelConfig, PipelineConfig, Stage
from pipeline.data.rows import load_rows
from pipeline.errors import UserError
from pipeline.runs.run import Run

CONF = Path(__file__).parents[3] / "conf" / "data"

SIMPLE = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "thinking": "A greeting.", "content": "Hello."},
]
CALLED = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}

SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpaca": (
        {"instruction": "Translate.", "input": "Bonjour.", "output": "Hello."},
        {
            "messages": [
                {"role": "user", "content": "Translate.\n\nBonjour."},
                {"role": "assistant", "content": "Hello."},
            ]
        },
    ),
    "arithmetic": (
        {"messages": SIMPLE},
        {"messages": SIMPLE},
    ),
    "chat": (
        {
            "messages": [
                {"role": "user", "content": "2 more?", "name": "ann"},
                {
                    "role": "assistant",
                    "content": None,
                    "refusal": None,
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "5"},
                {"role": "assistant", "content": "5.", "weight": 1},
            ],
            "tools": [ADD],
            "parallel_tool_calls": False,
        },
        {
            "messages": [
                {"role": "user", "content": "2 more?"},
                {"role": "assistant", "content": "", "tool_calls": [CALLED]},
                {"role": "tool", "content": "5"},
                {"role": "assistant", "content": "5."},
            ],
            "tools": [ADD],
        },
    ),
    "demo": (
        {"reasoning_language": "French", "messages": SIMPLE},
        {"messages": SIMPLE, "reasoning_language": "French"},
    ),
    "demo_refusal": (
        {"messages": SIMPLE},
        {"messages": SIMPLE},
    ),
    "false_reject": (
        {
            "prompt": "Hi?",
            "category": 3,
            "category_text": "Greetings",
            "instruct_response": "Good day.",
            "cot_response": {"reasoning_content": "A greeting.", "solution": "Hello."},
        },
        {"messages": SIMPLE},
    ),
    "multilingual_thinking": (
        {
            "reasoning_language": "French",
            "developer": "Be kind.",
            "user": "Hi?",
            "analysis": "Un salut.",
            "final": "Hello.",
            "messages": [
                {"content": "reasoning language: French\n\nBe kind.", "role": "system", "thinking": None},
                {"content": "Hi?", "role": "user", "thinking": None},
                {"content": "Hello.", "role": "assistant", "thinking": "Un salut."},
            ],
        },
        {
            "messages": [
                {"role": "system", "content": "reasoning language: French\n\nBe kind."},
                {"role": "user", "content": "Hi?"},
                {"role": "assistant", "thinking": "Un salut.", "content": "Hello."},
            ],
            "reasoning_language": "French",
        },
    ),
    "prompt_completion": (
        {"prompt": "Hi?", "completion": "Hello."},
        {"messages": [SIMPLE[0], {"role": "assistant", "content": "Hello."}]},
    ),
    "sharegpt": (
        {
            "id": "x",
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi?"},
                {"from": "gpt", "value": "Hello."},
            ],
        },
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Hi?"},
                {"role": "assistant", "content": "Hello."},
            ]
        },
    ),
}
"""File in conf/data/ -> a row of its data set, and the conversation that the row must become."""


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def data_config(name: str, path: Path, **settings: Any) -> DataConfig:
    """Read conf/data/<name>.yaml, but replace its path, and hold out rows instead of reading a split for validation."""
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(CONF / f"{name}.yaml"))
    found: Any = OmegaConf.to_object(
        OmegaConf.merge(merged, {"path": str(path), "validation": {"split": None}, **settings})
    )
    return found


def load(settings: DataConfig) -> list[dict[str, Any]]:
    """Load the conversations, without fields that are None."""
    config = PipelineConfig(stage=Stage.sft, run_dir="run", model=ModelConfig(path="unused"), data=settings)
    names = ("messages", "tools", "reasoning_effort", "reasoning_language")
    found = load_rows(Run(config), settings).conversations
    return [{name: value for name in names if (value := getattr(one, name)) is not None} for one in found]


def load_error(settings: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        load(settings)
    return str(caught.value)


def jsonl(rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = Path(name)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_every_file_in_conf_data_is_tested() -> None:
    assert set(SHAPES) == {path.stem for path in CONF.glob("*.yaml")}


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_of_its_shape_is_read(name: str) -> None:
    row, conversation = SHAPES[name]
    assert load(data_config(name, jsonl([row]))) == [conversation]


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_of_its_shape_is_read_from_parquet(name: str) -> None:
    """Arrow adds the keys that a row does not have, with the value None."""
    row, conversation = SHAPES[name]
    datasets.Dataset.from_list([row, row]).to_parquet("rows.parquet")
    assert load(data_config(name, Path("rows.parquet"))) == [conversation] * 2


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"arithmetic", "chat", "multilingual_thinking"}))
def test_rows_of_another_shape_are_one_message_that_names_the_existing_columns(name: str) -> None:
    message = load_error(data_config(name, jsonl([{"text": "x", "meta": {"id": 1, "tag": "a"}}] * 1000)))
    assert "no row of rows.jsonl has that column. Existing columns: text, meta.id, meta.tag." in message
    assert message.count("Existing columns:") == len([line for line in message.splitlines() if "data.columns." in line])
    assert "row 1" not in message


# --- columns ---------------------------------------------------------------------------------------------------------


def with_columns(path: Path, **columns: Any) -> DataConfig:
    return DataConfig(path=str(path), columns=ColumnsConfig(**columns))


def single_turn(**more: Any) -> dict[str, Any]:
    return {"messages": None, "prompt": "question", "completion": "answer", **more}


ROW = {"question": "Hi?", "answer": "Hello.", "why": "A greeting.", "rules": "Be kind.", "language": "French"}


def test_every_column_can_be_named() -> None:
    columns = single_turn(reasoning="why", system="rules", reasoning_language="language", reasoning_effort="effort")
    assert load(with_columns(jsonl([{**ROW, "effort": "low"}]), **columns)) == [
        {
            "messages": [{"role": "system", "content": "Be kind."}, *SIMPLE],
            "reasoning_effort": "low",
            "reasoning_language": "French",
        }
    ]


def test_a_column_with_a_dot_in_its_name_is_preferred_to_a_nested_one() -> None:
    row = {"a.b": "Hi?", "a": {"b": "no"}, "answer": "Hello."}
    (found,) = load(with_columns(jsonl([row]), messages=None, prompt="a.b", completion="answer"))
    assert found["messages"][0]["content"] == "Hi?"


def test_some_rows_may_lack_an_option() -> None:
    rows = [ROW, {"question": "Hi?", "answer": "Hello."}]
    with_reasoning, without = load(with_columns(jsonl(rows), **single_turn(reasoning="why")))
    assert with_reasoning["messages"] == SIMPLE
    assert without["messages"] == [SIMPLE[0], {"role": "assistant", "content": "Hello."}]


def test_an_option_that_no_row_has_is_an_error() -> None:
    message = load_error(with_columns(jsonl([ROW] * 3), **single_turn(reasoning="whyy", system="rulez")))
    there = "Existing columns: question, answer, why, rules, language."
    assert message == (
        "2 problems:\n"
        f"  - data.columns.reasoning='whyy': no row of rows.jsonl has that column. Did you mean 'why'? {there}\n"
        f"  - data.columns.system='rulez': no row of rows.jsonl has that column. Did you mean 'rules'? {there}"
    )


@pytest.mark.parametrize("setting", ["prompt", "completion"])
def test_only_missing_columns_are_named(setting: str) -> None:
    message = load_error(with_columns(jsonl([ROW] * 3), **single_turn(**{setting: "text"})))
    assert message.startswith(f"data.columns.{setting}='text': no row of rows.jsonl has that column. Existing columns:")


def test_a_row_without_a_column_that_others_have_is_named() -> None:
    message = load_error(with_columns(jsonl([ROW, {"question": "Hi?"}]), **single_turn()))
    assert message == "rows.jsonl: row 2: has no 'answer' (it has: question)."


@pytest.mark.parametrize("name", ["chat", "false_reject"])
def test_a_file_without_valid_rows_is_not_reported_to_lack_columns(name: str) -> None:
    Path("rows.jsonl").write_text("role,content\n[1]\n")
    lines = load_error(data_config(name, Path("rows.jsonl"), filter={"kind": ["a"]})).splitlines()
    assert lines[0] == "2 problems:"
    assert lines[1].startswith("  - rows.jsonl: row 1: not valid JSON")
    assert lines[2].startswith("  - rows.jsonl: row 2: is a list, not an object with")


def test_a_column_that_is_not_text_is_named() -> None:
    message = load_error(with_columns(jsonl([ROW, {**ROW, "answer": ["Hello."]}]), **single_turn()))
    assert message == "rows.jsonl: row 2: 'answer' is list, not text."


def test_an_unknown_role_is_named() -> None:
    rows = [{"conversations": [{"from": "human", "value": "Hi?"}, {"from": "bard", "value": "Hello."}]}]
    message = load_error(data_config("sharegpt", jsonl(rows)))
    assert message.startswith("rows.jsonl: row 1: messages[1] has the unknown role 'bard'")


@pytest.mark.parametrize("nothing", ["", None])
def test_an_instruction_without_input_is_the_whole_prompt(nothing: str | None) -> None:
    rows = [SHAPES["alpaca"][0], {"instruction": "Hi?", "input": nothing, "output": "Hello."}]
    _, found = load(data_config("alpaca", jsonl(rows)))
    assert found["messages"] == [SIMPLE[0], {"role": "assistant", "content": "Hello."}]


def test_an_input_that_is_not_text_is_named() -> None:
    message = load_error(data_config("alpaca", jsonl([{**SHAPES["alpaca"][0], "input": 7}])))
    assert message == "rows.jsonl: row 1: 'input' is int, not text."


def test_messages_without_the_key_of_the_role_are_one_message() -> None:
    rows = [{"messages": [{"author": "user", "text": "Hi?"}]}] * 100
    assert load_error(data_config("chat", jsonl(rows))).splitlines() == [
        "2 problems:",
        "  - data.columns.role='role': no message of rows.jsonl has that key. Existing keys: author, text.",
        "  - data.columns.content='content': no message of rows.jsonl has that key. Existing keys: author, text.",
    ]


def test_some_messages_without_the_key_of_the_role_are_named() -> None:
    rows = [{"messages": SIMPLE}, {"messages": [SIMPLE[0], {"content": "Hello."}]}]
    assert (
        load_error(data_config("chat", jsonl(rows)))
        == "rows.jsonl: row 2: messages[1] has no 'role' (it has: content)."
    )


def test_a_key_of_reasoning_that_no_message_has_is_an_error() -> None:
    message = load_error(with_columns(jsonl([{"messages": SIMPLE}]), thinking="thoughts"))
    assert message.startswith("data.columns.thinking='thoughts': no message of rows.jsonl has that key.")


def test_a_key_is_found_after_many_other_keys() -> None:
    answer = {"role": "assistant", "content": "Hello.", "why": "A greeting."}
    many = [{**SIMPLE[0], **{f"key_{i}": i for i in range(100)}}, answer]
    (found,) = load(with_columns(jsonl([{"messages": many}]), thinking="why"))
    assert found["messages"] == SIMPLE


@pytest.mark.parametrize(("role", "meant"), [("human", "user"), ("gpt", "assistant"), ("Bot", "assistant")])
def test_a_role_of_another_format_is_answered_with_the_setting(role: str, meant: str) -> None:
    rows = [{"messages": [{"role": role, "content": "Hi?"}, SIMPLE[1]]}] * 3
    message = load_error(data_config("chat", jsonl(rows)))
    assert message.startswith(f"rows.jsonl: 3 rows (1, 2 and 3): messages[0] has the unknown role '{role}'; roles are")
    assert message.endswith(f". Set 'data.roles={{{role}: {meant}}}'.")


def unused(capsys: pytest.CaptureFixture[str], settings: DataConfig) -> str:
    load(settings)
    return capsys.readouterr().err


def test_unused_instructions_are_reported_with_the_setting_that_uses_them(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"system_prompt": "Be kind.", "conversations": SHAPES["sharegpt"][0]["conversations"][1:]}
    assert "the column 'system_prompt' is not used. To use it, set data.columns.system=system_prompt" in unused(
        capsys, data_config("sharegpt", jsonl([row]))
    )
    settings = data_config("sharegpt", jsonl([row]), columns={"system": "system_prompt"})
    assert unused(capsys, settings) == ""
    assert load(settings)[0]["messages"][0] == {"role": "system", "content": "Be kind."}


def test_instructions_that_the_messages_have_already_are_not_reported(capsys: pytest.CaptureFixture[str]) -> None:
    row = {**SHAPES["sharegpt"][0], "system": "Be kind."}
    assert unused(capsys, data_config("sharegpt", jsonl([row]))) == ""


def test_unused_reasoning_and_input_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    row = {**SHAPES["alpaca"][0], "reasoning": "Because."}
    message = unused(capsys, with_columns(jsonl([row]), messages=None, prompt="instruction", completion="output"))
    assert "set data.columns.reasoning=reasoning" in message and "set data.columns.input=input" in message


# --- filter ----------------------------------------------------------------------------------------------------------


def of_categories(*texts: str) -> Path:
    row = SHAPES["false_reject"][0]
    return jsonl([{**row, "category_text": text, "category": i} for i, text in enumerate(texts)])


def test_a_filter_keeps_the_rows_with_one_of_its_values_and_reports_their_number(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = of_categories("a", "b", "c", "a")
    assert len(load(data_config("false_reject", path, filter={"category_text": ["a", "c"]}))) == 3
    assert "[data] data.filter keeps 3 of 4 rows of rows.jsonl" in capsys.readouterr().out


def test_a_row_must_pass_the_filters_of_all_columns() -> None:
    settings = data_config(
        "false_reject", of_categories("a", "b", "a"), filter={"category_text": ["a"], "category": [2]}
    )
    assert len(load(settings)) == 1


def test_rows_that_a_filter_drops_are_not_checked() -> None:
    path = jsonl([{**ROW, "kind": "good"}, {"kind": "bad"}])
    settings = with_columns(path, **single_turn())
    settings.filter = {"kind": ["good"]}
    assert len(load(settings)) == 1


def test_a_filter_that_keeps_nothing_is_an_error() -> None:
    message = load_error(data_config("false_reject", of_categories("a", "b"), filter={"category_text": ["z"]}))
    assert message == "data.filter={'category_text': ['z']}: keeps none of the 2 rows."


def test_a_filter_on_a_missing_column_is_an_error() -> None:
    message = load_error(data_config("false_reject", of_categories("a"), filter={"kind": ["a"]}))
    assert message.startswith(
        "data.filter='kind': no row of rows.jsonl has that column. Existing columns: prompt, category,"
    )
