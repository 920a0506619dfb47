"""Rendered rows have openai-harmony's tokens, with the vocabulary of the released models.

The tests need the package and its vocabulary (TIKTOKEN_ENCODINGS_BASE). They are skipped otherwise.
"""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from data_files import ADD_FUNCTION

from pipeline.data.harmony import Rendering
from pipeline.data.parsing import parse_conversation
from pipeline.doctor import parity
from pipeline.doctor.rows import Row
from pipeline.models import tiny_tokenizer

RANKS = "o200k_base.tiktoken"
QUESTION = {"role": "user", "content": "What is 2 + 3?"}
ANSWER = {"role": "assistant", "thinking": "2 + 3 = 5", "content": "It's 5, naïve as that sounds. 火车 🚂"}
CALL = {"role": "assistant", "thinking": "I add.", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
ROWS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [QUESTION, ANSWER]},
    "no reasoning": {"messages": [QUESTION, {"role": "assistant", "content": "5"}]},
    "two turns": {"messages": [QUESTION, ANSWER, QUESTION, ANSWER]},
    "instructions": {"messages": [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER]},
    "high effort": {"messages": [QUESTION, ANSWER], "reasoning_effort": "high"},
    "tools": {"messages": [QUESTION, CALL, {"role": "tool", "content": "5"}, ANSWER], "tools": [ADD_FUNCTION]},
    "tools and instructions": {
        "messages": [
            {"role": "developer", "content": "Add."},
            QUESTION,
            CALL,
            {"role": "tool", "content": "5"},
            ANSWER,
        ],
        "tools": [ADD_FUNCTION],
    },
    "a turn after tools": {
        "messages": [QUESTION, CALL, {"role": "tool", "content": "5"}, ANSWER, QUESTION, ANSWER],
        "tools": [ADD_FUNCTION],
    },
}


def row(name: str) -> Row:
    return Row(parse_conversation(ROWS[name], name), [])


def rendering(tokenizer: Any, **more: Any) -> Rendering:
    return Rendering(
        tokenizer, **{"reasoning_effort": "medium", "conversation_date": "2025-08-05", "every_turn": True, **more}
    )


@pytest.fixture(scope="module")
def released() -> Iterator[Any]:
    """The tokenizer of the released models, made from harmony's own vocabulary. harmony loads its encoding once."""
    ranks = Path(os.environ.get("TIKTOKEN_ENCODINGS_BASE", "")) / RANKS
    if not ranks.is_file():
        pytest.skip(f"needs shared test data: {RANKS}, in the folder that TIKTOKEN_ENCODINGS_BASE names")
    import openai_harmony

    tokenizer = tiny_tokenizer.make_released(ranks)
    with patch.object(openai_harmony, "load_harmony_encoding", cache(openai_harmony.load_harmony_encoding)):
        yield tokenizer


@pytest.mark.parametrize("form", ["harmony", "template"])
@pytest.mark.parametrize("every_turn", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_rendered_rows_have_harmonys_tokens(released: Any, name: str, every_turn: bool, form: str) -> None:
    found = parity.figures([row(name)], rendering(released, every_turn=every_turn, form=form))
    turns = sum(message["role"] == "assistant" for message in ROWS[name]["messages"])
    assert found == {"is_checked": True, "examples": turns if every_turn else 1, "differ": 0, "first": None}


def test_a_changed_template_is_found_and_quoted(released: Any) -> None:
    original = released.chat_template
    released.chat_template = original.replace("Knowledge cutoff: 2024-06", "Knowledge cutoff: 2023-06")
    try:
        found = parity.figures([row("one turn"), row("two turns")], rendering(released, form="template"))
    finally:
        released.chat_template = original
    assert (found["examples"], found["differ"]) == (3, 3)
    first = found["first"]
    assert first["where"] == "one turn" and "202" in first["ours"] and first["ours"] != first["theirs"]
