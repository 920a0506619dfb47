"""When token parity with openai-harmony cannot be checked, the reason is stated.

tests/integration/test_released_vocabulary.py compares tokens.
"""

from pathlib import Path
from typing import Any

import pytest

from pipeline.data.harmony import Rendering
from pipeline.data.parsing import parse_conversation
from pipeline.doctor import parity
from pipeline.doctor.rows import Row


def figures(tokenizer: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}]
    rendering = Rendering(tokenizer, reasoning_effort="medium", conversation_date="2025-08-05", every_turn=True)
    return parity.figures([Row(parse_conversation({"messages": messages}, "row 1"), [])], rendering)


def test_without_the_package_parity_is_reported_as_not_checked(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert figures(tokenizer) == {"is_checked": False, "reason": "the package openai-harmony is not installed"}


@pytest.mark.parametrize("variable", ["TIKTOKEN_ENCODINGS_BASE", "TIKTOKEN_RS_CACHE_DIR"])
def test_without_the_vocabulary_parity_is_not_checked_and_nothing_is_fetched(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    monkeypatch.delenv("TIKTOKEN_ENCODINGS_BASE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    found = figures(tokenizer)
    assert not found["is_checked"]
    assert f"{tmp_path}/" in found["reason"] and "TIKTOKEN_ENCODINGS_BASE" in found["reason"]


def test_a_tokenizer_with_another_vocabulary_is_not_checked(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "o200k_base.tiktoken").touch()
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    found = figures(tokenizer)
    assert not found["is_checked"] and "not the released models' tokenizer" in found["reason"]
