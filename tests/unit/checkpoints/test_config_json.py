"""config.json of a gpt-oss model is read, and checked."""

import json
from pathlib import Path

import pytest

from pipeline.checkpoints.config_json import read_model
from pipeline.errors import UserError


def test_a_model_is_read_with_all_keys(tiny: Path) -> None:
    assert read_model(tiny) == json.loads((tiny / "config.json").read_text())


@pytest.mark.parametrize("wrong", [{"model_type": "llama"}, {"num_hidden_layers": 0}, {"num_experts_per_tok": "4"}])
def test_a_wrong_value_is_an_error_that_names_it(tiny: Path, tmp_path: Path, wrong: dict[str, object]) -> None:
    content = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **wrong}))

    with pytest.raises(UserError, match=next(iter(wrong))):
        read_model(tmp_path)
