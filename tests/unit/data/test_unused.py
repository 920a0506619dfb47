"""Nothing is dropped without a word: each unused column or key is listed once, with its number of rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ColumnsConfig
from tests.data_files import config_of, conversations, jsonl, load, load_error, parquet

USER = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "content": "Eight."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": None}}}]}
TOOL = {"role": "tool", "content": "8"}
PROMPT_COMPLETION = ColumnsConfig(messages=None, prompt="prompt", completion="completion")


def numbered(count: int, *messages: dict[str, Any], **columns: Any) -> list[dict[str, Any]]:
    """Make rows with different questions."""
    first, *rest = messages or (USER, ANSWER)
    return [{"messages": [{**first, "content": f"{i}?"}, *rest], **columns} for i in range(count)]


def counts(path: Path, **settings: Any) -> dict[str, int]:
    (found,) = load(config_of(path, **settings)).unused
    return dict(found.counts)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


UNUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a column": ({"notes": "x"}, "notes"),
    "a nested column": ({"more": {"notes": "x"}}, "more.notes"),
    "a key of a message": ({"messages": [{**USER, "mood": "x"}, ANSWER]}, "messages[].mood"),
    "the name of a user": ({"messages": [{**USER, "name": "Ada"}, ANSWER]}, "messages[].name"),
    "the channel of a user": ({"messages": [{**USER, "channel": "slack"}, ANSWER]}, "messages[].channel"),
    **{
        f"the content type of {name}": ({"messages": messages}, "messages[].content_type")
        for name, messages in {
            "a call in code": [USER, {**CALL, "content_type": "code"}, TOOL, ANSWER],
            "an answer": [USER, {**ANSWER, "content_type": "json"}],
            "a result": [USER, CALL, {**TOOL, "content_type": "json"}, ANSWER],
            "a user": [{**USER, "content_type": "text"}, ANSWER],
        }.items()
    },
    "the recipient of a result": (
        {"messages": [USER, CALL, {**TOOL, "recipient": "functions.add"}, ANSWER]},
        "messages[].recipient",
    ),
    "the channel of a result": (
        {"messages": [USER, CALL, {**TOOL, "channel": "analysis"}, ANSWER]},
        "messages[].channel",
    ),
    "the type of a call": (
        {"messages": [USER, {**CALL, "tool_calls": [{"type": "custom", "name": "add"}]}, TOOL, ANSWER]},
        "messages[].tool_calls[].type",
    ),
    "a name beside a called function": (
        {"messages": [USER, {**CALL, "tool_calls": [{"name": "sub", "function": {"name": "add"}}]}, TOOL, ANSWER]},
        "messages[].tool_calls[].name",
    ),
    "a name beside a tool's function": (
        {"tools": [{"name": "sub", "function": {"name": "add", "description": ""}}]},
        "tools[].name",
    ),
    "a key of a part": (
        {"messages": [{**USER, "content": [{"type": "text", "text": "a", "mood": 1}]}, ANSWER]},
        "messages[].content[].mood",
    ),
    "a key of a call": (
        {"messages": [USER, {**CALL, "tool_calls": [{"name": "add", "mood": 1}]}, TOOL, ANSWER]},
        "messages[].tool_calls[].mood",
    ),
    "a key of a called function": (
        {"messages": [USER, {**CALL, "tool_calls": [{"function": {"name": "add", "mood": 1}}]}, TOOL, ANSWER]},
        "messages[].tool_calls[].function.mood",
    ),
    "a key of a tool": ({"tools": [{"name": "add", "description": "", "mood": 1}]}, "tools[].mood"),
    "a key of a tool's function": (
        {"tools": [{"type": "function", "function": {"name": "add", "description": "", "mood": 1}}]},
        "tools[].function.mood",
    ),
}


@pytest.mark.parametrize(("changed", "name"), UNUSED.values(), ids=UNUSED.keys())
def test_what_is_not_used_is_counted_by_row(changed: dict[str, Any], name: str, tmp_path: Path) -> None:
    rows = [*numbered(2), *({**row, **changed} for row in numbered(3))]
    assert counts(jsonl(tmp_path / "a.jsonl", rows)) == {name: 3}


@pytest.mark.parametrize("value", [None, "", [], {}])
def test_an_empty_column_is_not_listed(value: Any, tmp_path: Path) -> None:
    assert counts(jsonl(tmp_path / "a.jsonl", numbered(2, notes=value))) == {}


def test_known_forms_leave_nothing_unused(tmp_path: Path) -> None:
    messages = [
        *(
            {**USER, "weight": 0},
            {
                **CALL,
                "content_type": "json",
                "function_call": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
            },
        ),
        {**TOOL, "tool_call_id": "1", "name": "add", "channel": "commentary", "recipient": "assistant"},
        {**ANSWER, "reasoning_content": "x", "weight": 1},
    ]
    assert counts(jsonl(tmp_path / "a.jsonl", numbered(2, *messages, system="Be brief."))) == {}
    by_recipient = [
        USER,
        {**ANSWER, "content": "{}", "recipient": "functions.add", "content_type": "<|constrain|>json"},
    ]
    assert counts(jsonl(tmp_path / "b.jsonl", numbered(2, *by_recipient))) == {}


def test_what_is_not_used_is_listed_once_and_harmless_columns_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*numbered(3, id="7", source="web", mood="x"), *numbered(1, tone=1)])
    config = config_of(path)
    load(config)
    printed = capsys.readouterr()
    assert (
        printed.err.count("not part of the conversations") == 1
        and printed.out.count("not part of the conversations") == 1
    )
    assert f"{path}: not part of the conversations: mood (3 rows), tone (1 row)." in printed.err.replace("\n", " ")
    assert f"{path}: not part of the conversations, and harmless: id (3 rows), source (3 rows)" in printed.out
    (again,) = load(config).unused
    assert again.counts == {"id": 3, "source": 3, "mood": 3, "tone": 1}
    assert "not part of the conversations" not in "".join(capsys.readouterr())


def test_rows_that_a_filter_drops_are_not_counted(tmp_path: Path) -> None:
    rows = [*numbered(2, kind="a", mood="x"), *numbered(3, kind="b", tone="x")]
    assert counts(jsonl(tmp_path / "a.jsonl", rows), filter={"kind": ["a"]}) == {"mood": 2}


def test_a_chosen_key_of_reasoning_leaves_the_usual_ones_unused(tmp_path: Path) -> None:
    answer = {**ANSWER, "why": "2 times 4", "reasoning": "another"}
    path = jsonl(tmp_path / "a.jsonl", numbered(2, USER, answer))
    assert counts(path, columns=ColumnsConfig(thinking="why")) == {"messages[].reasoning": 2}
    (one, _) = conversations(path, columns=ColumnsConfig(thinking="why"))
    assert one.messages[1] == {**ANSWER, "thinking": "2 times 4"}


# --- instructions and tools in columns -------------------------------------------------------------------------------


def test_a_column_system_is_put_before_the_messages_once(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [*numbered(1, system="Be brief."), {"messages": [system, USER, ANSWER], "system": "Be brief."}]
    for row in conversations(jsonl(tmp_path / "a.jsonl", rows)):
        assert row.messages[0] == system and row.messages[1]["role"] == "user"


def test_a_column_system_can_be_left_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered(2, system="Linux"))
    assert conversations(path, columns=ColumnsConfig(system=None))[0].messages[0]["role"] == "user"
    assert counts(path, columns=ColumnsConfig(system=None)) == {"system": 2}


def test_a_column_system_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered(2, system={"os": "Linux"}))
    assert "set data.columns.system=null" in load_error(path)


IMAGE = {"role": "assistant", "content": [{"type": "image"}]}
LATE = {"role": "system", "content": "x"}


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ({"system": "Be brief.", "messages": [USER, IMAGE]}, "messages[1].content[0] is of type"),
        ({"system": "Be brief.", "messages": [USER, ANSWER, LATE, ANSWER]}, "messages[2] is a system message in mid-"),
        ({"system": "<|end|>", "messages": [USER, ANSWER]}, "system.content contains"),
        ({"system": "Be brief.", "prompt": [USER, IMAGE], "completion": "x"}, "prompt[1].content[0] is of type"),
        ({"system": "Be brief.", "prompt": [USER], "completion": [IMAGE]}, "completion[0].content[0] is of type"),
        ({"prompt": [USER], "completion": [{"content": "x"}]}, "completion[0] has no 'role'"),
        ({"system": "Be brief.", "prompt": "<|end|>", "completion": "x"}, "prompt.content contains"),
        ({"prompt": "x", "completion": "<|end|>"}, "completion.content contains"),
    ],
)
def test_a_bad_message_is_named_by_its_place_in_the_row(row: dict[str, Any], place: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row])
    columns = ColumnsConfig() if "messages" in row else PROMPT_COMPLETION
    assert f"row 1: {place}" in load_error(path, columns=columns)


def test_the_older_column_functions_offers_tools(tmp_path: Path) -> None:
    add = {"name": "add", "description": "Adds."}
    path = jsonl(tmp_path / "a.jsonl", numbered(2, functions=[add]))
    assert conversations(path)[0].tools == [{"type": "function", "function": add}]
    assert counts(path) == {}
    assert "have 'tools' and 'functions'" in load_error(jsonl(path, numbered(2, functions=[add], tools=[add])))


# --- prompts and completions of messages -----------------------------------------------------------------------------


def test_trls_conversational_form_trains_the_completion_alone(tmp_path: Path) -> None:
    row = {"prompt": [USER, ANSWER, USER], "completion": [{**ANSWER, "reasoning_content": "x"}]}
    (found,) = conversations(jsonl(tmp_path / "a.jsonl", [row]), columns=PROMPT_COMPLETION)
    assert found.messages == [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "thinking": "x"}]


def test_trls_conversational_form_is_recognized(tmp_path: Path) -> None:
    message = load_error(jsonl(tmp_path / "a.jsonl", [{"prompt": [USER], "completion": [ANSWER]}] * 2))
    assert "These look like conversational prompts and completions. Use data=prompt_completion." in message


def test_a_prompt_of_messages_may_have_a_text_as_completion(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": [USER], "completion": "Eight."}])
    assert conversations(path, columns=PROMPT_COMPLETION)[0].messages == [USER, ANSWER]


# --- columns that change the meaning ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"images": [{"bytes": "x"}]}, "have 'images', but the model reads only text"),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}}, "data.columns.reasoning_effort=chat_template_kwargs."),
        (
            {"chat_template_kwargs": {"model_identity": "Ada"}},
            "have 'chat_template_kwargs.model_identity', which changes",
        ),
    ],
)
def test_a_column_that_changes_the_meaning_is_an_error(columns: Any, reason: str, tmp_path: Path) -> None:
    message = load_error(jsonl(tmp_path / "a.jsonl", numbered(3, **columns)))
    assert "3 rows (1, 2 and 3)" in message and reason in message


def test_earlier_turns_beside_a_prompt_are_an_error(tmp_path: Path) -> None:
    row = {"prompt": "And 3?", "completion": "12.", "history": [["2?", "8."]]}
    assert "has earlier turns in 'history'" in load_error(jsonl(tmp_path / "a.jsonl", [row]), columns=PROMPT_COMPLETION)


def test_rows_of_another_split_are_an_error_until_the_filter_chooses(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*numbered(4, split="train"), *numbered(2, split="test")])
    message = load_error(path)
    assert "the column 'split' says train in 4 rows, test in 2 rows, but all of them would be used" in message
    assert message.endswith("Choose the rows: 'data.filter.split=[train]'")
    assert len(conversations(path, filter={"split": ["train"]})) == 4
    assert len(conversations(jsonl(path, numbered(4, split="train")))) == 4
    assert len(conversations(jsonl(path, numbered(4, split="left")))) == 4


# --- nulls -----------------------------------------------------------------------------------------------------------


def test_nulls_in_arguments_are_kept_in_json_and_dropped_and_counted_in_parquet(tmp_path: Path) -> None:
    called = {**CALL, "tool_calls": [{"function": {"name": "add", "arguments": {"a": None, "b": 1}}}]}
    rows = numbered(2, USER, called, TOOL, ANSWER)
    of_json, of_parquet = jsonl(tmp_path / "a.jsonl", rows), parquet(tmp_path / "a.parquet", rows)
    assert conversations(of_json)[0].messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": None, "b": 1}
    assert conversations(of_parquet)[0].messages[1]["tool_calls"][0]["function"]["arguments"] == {"b": 1}
    assert counts(of_json) == {}
    assert counts(of_parquet) == {"nulls in the arguments of tool calls": 2}


# --- text that is written as control tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["content", "thinking"])
def test_control_text_is_named_once_by_the_first_stage_that_reads_the_rows(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [{**ANSWER, key: text} for text in ("<think>2 times 4</think>", "[INST] <think>", "a < b[0]")]
    path = jsonl(tmp_path / "a.jsonl", [row for answer in answers for row in numbered(2, USER, answer)])
    config = config_of(path)
    load(config)
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if "control tokens" in line)
    assert "[data] warning: rows whose text contains control tokens of a chat format: 4" in warning
    assert f"({path}: row 1; {path}: row 2; {path}: row 3, …)" in warning
    assert "Rows by token: <think> (4), </think> (2), [INST] (2)." in warning
    load(config)
    assert "control tokens" not in capsys.readouterr().err


# --- keys that occur twice in an object ------------------------------------------------------------------------------

TWICE = {
    "a column": ('{"messages": [], "messages": %s}', "messages"),
    "a key of a message": ('{"messages": [{"role": "user", "content": "a", "content": "b"}], "x": %s}', "content"),
    "a key of a nested column": ('{"more": {"tone": 1, "tone": null}, "messages": %s}', "tone"),
}


@pytest.mark.parametrize(("text", "key"), TWICE.values(), ids=TWICE.keys())
@pytest.mark.parametrize("form", ["a.jsonl", "list.json", "lines.json", "object.json"])
def test_a_key_that_occurs_twice_in_an_object_is_a_problem_of_its_row(
    form: str, text: str, key: str, tmp_path: Path
) -> None:
    lines = [json.dumps(row) for row in numbered(3)]
    lines[1] = text % json.dumps(numbered(1)[0]["messages"])
    path = tmp_path / form
    path.write_text(
        {"list.json": f"[{','.join(lines)}]", "object.json": f'{{"data": [{",".join(lines)}]}}'}.get(
            form, "\n".join(lines)
        )
    )
    assert load_error(path).startswith(f"{path}: row 2")
    assert f": an object has the key '{key}' twice, so one of its values would be lost. Keep one." in load_error(path)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"messages": '[{"role": "user", "role": "assistant", "content": "x"}]'}, "'messages' is text, but not a list"),
        ({"tools": '[{"name": "add", "name": "sub", "description": "x"}]'}, "'tools': an object has the key 'name'"),
        (
            {"messages": [USER, {**CALL, "tool_calls": [{"name": "add", "arguments": '{"a": 1, "a": 2}'}]}]},
            "messages[1].tool_calls[0].arguments: an object has the key 'a' twice",
        ),
    ],
)
def test_a_key_that_occurs_twice_in_json_text_of_a_row_is_a_problem(columns: Any, reason: str, tmp_path: Path) -> None:
    (row,) = numbered(1)
    message = load_error(jsonl(tmp_path / "a.jsonl", [{**row, **columns}]))
    assert reason in message and "twice, so one of its values would be lost. Keep one" in message
