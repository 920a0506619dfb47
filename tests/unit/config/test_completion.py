"""Tab completion: the candidates for a word."""

import pytest
from conftest import run_program

from config.composing import RECIPES, STAGES, Mistake, choices
from pipeline import __main__ as program
from pipeline.config import completion
from pipeline.config.descriptions import describe_settings


def texts(word: str, before: str = "") -> list[str]:
    return [each.text for each in completion.complete(word, program.FOLDERS, before)]


def test_every_stage_recipe_and_choice_of_a_group_is_found() -> None:
    assert texts("stage=") == sorted(f"stage={name}" for name in STAGES)
    assert texts("recipe=") == [f"recipe={name}" for name in RECIPES]
    for choice in choices():
        assert choice in texts(f"{choice.partition('=')[0]}=")


def test_every_setting_is_reached_one_section_at_a_time() -> None:
    open_words, found = [""], set()
    while open_words:
        for text in texts(open_words.pop()):
            (open_words.append if text.endswith(".") else found.add)(text)
    settings = {each.key for each in describe_settings() if "[]" not in each.key}
    groups = {"train@sft", "train@qat", "eval", "model", "data", "format", "tracking"}
    assert found == {f"{key}=" for key in settings | groups}


WORDS = {
    "st": ["stage="],
    "sft.learning": ["sft.learning_rate="],
    "sft.lo": ["sft.logging_steps=", "sft.lora."],
    "sft.precision=": ["sft.precision=bf16", "sft.precision=fp32", "sft.precision=mixed_bf16"],
    "overwrite=tr": ["overwrite=true"],
    "overwrite=sft,q": ["overwrite=sft,qat", "overwrite=sft,quantize"],
    "upcast.experts=": ["upcast.experts=bf16", "upcast.experts=null", "upcast.experts=packed"],
    "format=mxfp4,nvfp4_": ["format=mxfp4,nvfp4_w4a4"],
    "sft.lora.targets=[attention,e": ["sft.lora.targets=[attention,experts"],
    "--ver": ["--version"],
    "run_dir=": [],
    "xyz": [],
    "xyz=": [],
}


@pytest.mark.parametrize(("word", "expected"), WORDS.items())
def test_a_word_is_completed(word: str, expected: list[str]) -> None:
    assert texts(word) == expected


def test_a_word_after_a_flag_is_completed_to_the_values_of_the_flag() -> None:
    assert texts("sf", before="--help") == ["sft", "sft."]
    assert texts("", before="--cfg") == ["all", "hydra", "job"]
    assert texts("install=b", before="-sc") == ["install=bash"]


def test_the_program_prints_candidates_with_their_meanings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("--shell-completion", "query=model.p") == 0
    text, meaning = capsys.readouterr().out.rstrip("\n").split("\t")
    assert text == "model.path=" and meaning.startswith("Checkpoint to start from")


def test_an_unknown_shell_is_refused(mistake: Mistake) -> None:
    message = mistake("-sc", "install=bahs")
    assert message.startswith("--shell-completion install=bahs: unknown. Did you mean 'bash'?")


def test_without_an_order_the_program_explains_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("--shell-completion") == 0
    text = capsys.readouterr().out
    assert all(f"--shell-completion install={shell}" in text for shell in completion.SHELLS)
