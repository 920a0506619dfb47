"""Rows of a usual form are recognized, and the advised settings read them."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_files import blend, config_of, conversations, jsonl, load_error
from omegaconf import OmegaConf

from pipeline.config import BlendPartConfig, ColumnsConfig, DataConfig
from pipeline.data.forms import Form, recognize
from pipeline.data.rows import load_rows
from pipeline.runs.run import Run

CONF = Path(__file__).parents[3] / "conf" / "data"
CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
SHAREGPT = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]

ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "alpaca": ({"instruction": "Hi?", "input": "", "output": "Hello."}, "Alpaca rows. Use data=alpaca."),
    "alpaca without input": (
        {"instruction": "Hi?", "output": "Hello."},
        "Alpaca rows. Use data=alpaca data.columns.input=null.",
    ),
    "sharegpt": ({"id": "x", "conversations": SHAREGPT}, "ShareGPT rows. Use data=sharegpt."),
    "sharegpt in messages": (
        {"messages": SHAREGPT},
        "ShareGPT rows. Use data=sharegpt data.columns.messages=messages.",
    ),
    "chat": ({"messages": CHAT}, "chats in the column 'messages'. Use data=chat."),
    "chat in conversations": (
        {"conversations": CHAT},
        "chats in the column 'conversations'. Use data=chat data.columns.messages=conversations.",
    ),
    "pairs": ({"prompt": "Hi?", "completion": "Hello."}, "questions and answers. Use data=prompt_completion."),
    "other pairs": (
        {"id": "7", "question": "Hi?", "answer": "Hello."},
        "questions and answers. Use data=prompt_completion data.columns.prompt=question"
        " data.columns.completion=answer.",
    ),
    "a chat and its answer": (
        {"input": CHAT[:1], "output": "Hello."},
        "conversational prompts and completions. Use data=prompt_completion data.columns.prompt=input"
        " data.columns.completion=output.",
    ),
    "Responses that are messages": (
        {"input": CHAT[:1], "output": [{**CHAT[1], "content": [{"type": "output_text", "text": "Hello."}]}]},
        "conversational prompts and completions. Use data=prompt_completion data.columns.prompt=input"
        " data.columns.completion=output.",
    ),
    "preferences": (
        {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go."},
        "preference pairs, of which only the preferred answer can be trained. Use data=prompt_completion"
        " data.columns.completion=chosen.",
    ),
    "preferences of chats": (
        {"chosen": CHAT, "rejected": CHAT},
        "preference pairs, of which only the preferred answer can be trained. Use data=chat"
        " data.columns.messages=chosen.",
    ),
}

pytestmark = pytest.mark.usefixtures("working_directory")


def form_of(row: dict[str, Any]) -> Form:
    form = recognize(row)
    assert isinstance(form, Form)
    return form


def group(name: str, **more: Any) -> DataConfig:
    """Read conf/data/<name>.yaml, with more settings."""
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(CONF / f"{name}.yaml"))
    found: Any = OmegaConf.to_object(OmegaConf.merge(merged, more))
    return found


@pytest.mark.parametrize("name", ROWS)
def test_the_advised_settings_are_named(name: str) -> None:
    row, advice = ROWS[name]
    assert form_of(row).advice("data") == f"These look like {advice}"


@pytest.mark.parametrize("name", ROWS)
def test_the_advised_settings_read_the_rows(name: str) -> None:
    row = ROWS[name][0]
    form, path = form_of(row), jsonl(Path("rows.jsonl"), [row])
    settings = group(form.group, path=str(path), columns=dict(form.columns), roles=dict(form.more_roles))
    (found,) = load_rows(Run(config_of(path)), settings).conversations
    assert [message["content"] for message in found.messages] == ["Hi?", "Hello."]
    own = ColumnsConfig(**{**form.own, **form.columns})  # for a part of a blend, which has no config group
    (found,) = conversations(path, columns=own, roles=dict(form.roles) | dict(form.more_roles))
    assert [message["content"] for message in found.messages] == ["Hi?", "Hello."]


@pytest.mark.parametrize("name", [name for name in ROWS if name != "chat"])
def test_rows_that_the_chat_settings_do_not_fit_are_one_message_with_the_advice(name: str) -> None:
    row, advice = ROWS[name]
    message = load_error(jsonl(Path("rows.jsonl"), [row] * 50))
    lines = [line for line in message.splitlines() if "data.columns.messages=" in line or "data.columns.role=" in line]
    assert any(line.endswith(f"These look like {advice}") for line in lines)
    assert "row 1" not in message


def test_a_part_of_a_blend_is_answered_with_its_own_settings() -> None:
    path = jsonl(Path("rows.jsonl"), [ROWS["sharegpt"][0]])
    message = load_error(None, blend=blend(BlendPartConfig(path=str(path), weight=1)))
    assert message.endswith(
        "These look like ShareGPT rows. Use data.blend[0].columns.messages=conversations"
        " data.blend[0].columns.role=from data.blend[0].columns.content=value"
        " 'data.blend[0].roles={human: user, gpt: assistant}'."
    )


def test_rows_of_no_usual_form_get_no_advice() -> None:
    assert recognize({"poem": "Once upon a time."}) is None
    message = load_error(jsonl(Path("rows.jsonl"), [{"poem": "x"}]))
    assert message.endswith("no row of rows.jsonl has that column. Existing columns: poem.")


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"text": "<s>Hi?</s> Hello."}, "texts without turns. Only conversations are trained. Give each conversation"),
        (
            {"input": CHAT[:1], "output": [{"type": "reasoning", "summary": []}, CHAT[1]]},
            "rows of OpenAI's Responses API. Join their input and output. Give each conversation as a list 'messages'",
        ),
        ({"input": "Hi?", "output": [CHAT[1]]}, "rows of OpenAI's Responses API. Join their input and output."),
    ],
)
def test_rows_that_no_settings_read_are_named_with_the_remedy(row: dict[str, Any], advice: str) -> None:
    assert f"These look like {advice}" in load_error(jsonl(Path("rows.jsonl"), [row] * 3))


@pytest.mark.parametrize("name", ["alpaca", "sharegpt", "chat", "pairs"])
def test_the_settings_of_a_group_are_those_in_conf(name: str) -> None:
    form = form_of(ROWS[name][0])
    settings = json.loads(json.dumps(OmegaConf.to_container(OmegaConf.load(CONF / f"{form.group}.yaml"))))
    assert settings.get("columns", {"messages": "messages"}) == form.own
    assert settings.get("roles", {}) == form.roles


def test_a_table_without_a_header_is_answered_with_the_place_of_the_names() -> None:
    path = Path("rows.csv")
    path.write_text("Add 0 and 7,7\nAdd 1 and 1,2\n", encoding="utf-8")
    message = load_error(path)
    assert (
        "Existing columns: Add 0 and 7, 7. Line 1 of a CSV or TSV file must hold the names of the columns." in message
    )
