"""A random model: its bytes do not depend on the steps in which it is made, and its tokenizer is checked."""

from pathlib import Path

import pytest
from run_files import read_files

from pipeline.config import TinyConfig
from pipeline.errors import UserError
from pipeline.models import tiny_model, tiny_tokenizer

SMALL = TinyConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_local_experts=5, head_dim=6)


@pytest.mark.parametrize("values", [1, 3000])
def test_a_model_made_in_small_steps_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: int
) -> None:
    tiny_model.create_tiny(tmp_path / "whole", SMALL)
    monkeypatch.setattr(tiny_model, "_STEP_VALUES", values)
    tiny_model.create_tiny(tmp_path / "parts", SMALL)
    assert read_files(tmp_path / "parts") == read_files(tmp_path / "whole")


def test_a_vocabulary_that_is_missing_or_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: there is no such file\. Give the file o200k_base\.tiktoken"):
        tiny_tokenizer.make_released(tmp_path / "none")
    with pytest.raises(UserError, match=r"model\.tiny\.vocab_size=100: must be at least 293"):
        tiny_tokenizer.train(100, ["text"])


def test_another_vocabulary_than_the_released_one_is_refused(tmp_path: Path) -> None:
    import base64

    ranks = tmp_path / "other.tiktoken"
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    ranks.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"other\.tiktoken: this is not the vocabulary o200k_base"):
        tiny_tokenizer.make_released(ranks)
