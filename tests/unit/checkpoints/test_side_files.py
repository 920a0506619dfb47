"""An export has the tokenizer, chat template and generation config of the exported model, where it has its own."""

import json
from pathlib import Path

import pytest

from pipeline.checkpoints.side_files import choose_side_files, describe_differences

BASE = {
    "tokenizer.json": "base",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "base",
    "chat_template.jinja": "base",
    "generation_config.json": "base",
    "LICENSE": "base",
}


def made(directory: Path, files: dict[str, str]) -> Path:
    directory.mkdir()
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


@pytest.mark.parametrize(
    ("own", "from_own", "left_out"),
    [
        ({}, set(), set()),
        ({"LICENSE": "own", "trainer_state.json": "own"}, set(), set()),
        ({"generation_config.json": "own"}, {"generation_config.json"}, set()),
        ({"chat_template.jinja": "own"}, {"chat_template.jinja"}, set()),
        (
            {"tokenizer.json": "own", "tokenizer_config.json": "{}"},
            {"tokenizer.json", "tokenizer_config.json"},
            {"special_tokens_map.json"},
        ),
        (
            {"tokenizer.json": "own", "tokenizer_config.json": json.dumps({"chat_template": "own"})},
            {"tokenizer.json", "tokenizer_config.json"},
            {"special_tokens_map.json", "chat_template.jinja"},
        ),
        ({"tokenizer_config.json": "{}"}, set(), set()),
    ],
)
def test_groups_of_files_are_taken_whole(
    own: dict[str, str], from_own: set[str], left_out: set[str], tmp_path: Path
) -> None:
    base, mine = made(tmp_path / "base", BASE), made(tmp_path / "own", own)
    chosen = choose_side_files(base, mine)
    assert {name for name, file in chosen.items() if file.parent == mine} == from_own
    assert chosen.keys() == BASE.keys() - left_out


def test_each_difference_is_one_line_and_equal_files_are_none(tmp_path: Path) -> None:
    base = made(tmp_path / "base", BASE)
    own = {"tokenizer.json": "base", "tokenizer_config.json": "{}", "added_tokens.json": "own"}
    mine = made(tmp_path / "own", own | {"chat_template.jinja": "own"})
    template = "chat_template.jinja"
    assert describe_differences(base, choose_side_files(base, mine)) == {
        "added_tokens.json": f"added_tokens.json: {mine / 'added_tokens.json'}, which is not in the base model",
        template: f"{template}: {mine / template}, which differs from the base model's",
        "special_tokens_map.json": "special_tokens_map.json: left out, because the model has files of its own",
    }
