"""Parsing of completions that the chat template wrote, and of malformed completions."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.config import TinyConfig
from pipeline.data import harmony
from pipeline.data.harmony import Rendering
from pipeline.data.parsing import parse_conversation
from pipeline.evaluate.transcripts import parse
from pipeline.models.tiny_model import create_tiny

QUESTION = {"role": "user", "content": "What is 2 + 3?"}
ADD = {"name": "add", "description": "Adds two numbers.", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def rendering(tmp_path_factory: pytest.TempPathFactory) -> Rendering:
    directory: Path = tmp_path_factory.mktemp("tokenizer") / "tiny"
    create_tiny(directory, TinyConfig())
    return Rendering(AutoTokenizer.from_pretrained(directory), "medium", "2025-08-05", every_turn=False)


def completion_of(rendering: Rendering, answer: dict[str, Any]) -> str:
    """Render an assistant's turn with the chat template."""
    row = {"messages": [QUESTION, {"role": "assistant", **answer}], "tools": [ADD]}
    (turn,) = harmony.render(parse_conversation(row), rendering).turns
    return turn.completion


@pytest.mark.parametrize("text", ["5", "two\n\nlines", " space ", "a <b> | c", "", "ümläut 🙂"])
def test_reasoning_and_answer_are_those_that_the_template_was_given(rendering: Rendering, text: str) -> None:
    found = parse(completion_of(rendering, {"thinking": f"so {text}", "content": text}))
    assert found == (f"so {text}", text, [])


def test_without_an_analysis_there_is_no_reasoning(rendering: Rendering) -> None:
    assert parse(completion_of(rendering, {"content": "5"})) == (None, "5", [])


def test_a_tool_call_has_the_name_and_the_arguments_that_the_template_was_given(rendering: Rendering) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    found = parse(completion_of(rendering, {"thinking": "I can add.", "content": None, "tool_calls": [call]}))
    assert (found.reasoning, found.answer) == ("I can add.", None)
    (made,) = found.tool_calls
    assert (made["name"], json.loads(made["arguments"])) == ("add", {"a": 2, "b": 3})


def test_the_recipient_may_stand_before_the_channel_or_after_it() -> None:
    expected = [{"name": "add", "arguments": "{}"}]
    assert parse(" to=functions.add<|channel|>commentary<|constrain|>json<|message|>{}<|call|>").tool_calls == expected
    assert parse("<|channel|>commentary to=functions.add <|constrain|>json<|message|>{}<|call|>").tool_calls == expected
    later = (
        "<|channel|>analysis<|message|>x<|end|><|start|>assistant to=functions.add<|channel|>commentary<|message|>{}"
    )
    assert parse(later) == ("x", None, expected)


def test_arguments_that_are_no_json_are_kept_as_they_are() -> None:
    found = parse("<|channel|>commentary to=functions.add<|message|>{a: <|call|>")
    assert found.tool_calls == [{"name": "add", "arguments": "{a: "}]


def test_what_a_model_tells_the_user_before_a_call_is_not_its_answer() -> None:
    assert parse("<|channel|>commentary<|message|>I will look it up.<|end|>") == (None, None, [])


def test_several_messages_of_a_channel_are_joined() -> None:
    two = "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
    assert parse(two).reasoning == "a\nb"


def test_what_was_cut_off_counts_as_far_as_it_came() -> None:
    assert parse("<|channel|>analysis<|message|>so far") == ("so far", None, [])
    assert parse("<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>4") == (
        "x",
        "4",
        [],
    )


@pytest.mark.parametrize(
    "malformed",
    [
        "",
        "just text",
        "<|message|><|message|>",
        "<|channel|>",
        "<|channel|>final",
        "<|channel|><|message|>x<|return|>",
        "<|end|><|start|><|start|>assistant<|return|>",
        "<|channel|>FINAL answer<|message|>x",
        "assistantfinal5",
    ],
)
def test_what_is_no_message_of_harmony_has_neither_reasoning_nor_answer(malformed: str) -> None:
    assert parse(malformed) == (None, None, [])


def test_a_message_is_found_after_rubbish() -> None:
    assert parse("um <|channel|><|channel|>final<|message|>5<|message|>6<|return|>").answer == "5"
