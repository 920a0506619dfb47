"""Unknown keys and choices are refused, with suggestions."""

from pathlib import Path

import pytest
from conftest import run_program
from omegaconf import OmegaConf

from config.composing import STAGES, SYNTHETIC_DATA, Mistake, composed, found_on, one_line, write_recipe
from pipeline import __main__ as program
from pipeline.config import PipelineConfig, composition, rules
from pipeline.errors import UserError

MISSPELT = {
    "sft.learning_rat=1": "'sft.learning_rate'",
    "stge=sft": "'stage'",
    "data.max_sample=1": "'data.max_samples'",
    "learning_rate=1": "'sft.learning_rate'",
    "sft.lora.rang=4": "'sft.lora.rank'",
    "exprot.source=qat": "'export.source'",
}


@pytest.mark.parametrize(("argument", "meant"), MISSPELT.items())
def test_a_misspelt_key_is_refused_with_the_right_one(argument: str, meant: str) -> None:
    message = one_line(found_on(argument))
    assert message.startswith(f"{argument}: unknown key '{argument.partition('=')[0]}'. Did you mean {meant}")


def test_an_unknown_key_is_refused_with_a_hint_at_the_help() -> None:
    message = one_line(found_on("xyzzy=1"))
    assert message == "xyzzy=1: unknown key 'xyzzy'. `--help` lists all keys."


@pytest.mark.parametrize("argument", ["+sft.lr=1", "++sft.lr=1", "+foo=1", "+sft.lora.bias=none"])
def test_a_plus_before_a_key_does_not_add_it(argument: str) -> None:
    message = one_line(found_on(argument))
    assert message.startswith(f"{argument}: unknown key '{argument.lstrip('+').partition('=')[0]}'.")


def test_resolve_refuses_keys_that_are_not_in_the_schema() -> None:
    node = composed("recipe=smoke", "stage=sft")
    OmegaConf.set_struct(node, False)
    OmegaConf.update(node, "sft.lr", 1, force_add=True)
    OmegaConf.update(node, "foo", {"bar": 1}, force_add=True)
    with pytest.raises(UserError) as caught:
        rules.resolve(node)
    assert "unknown key 'sft.lr'" in str(caught.value)
    assert "unknown key 'foo.bar'" in str(caught.value)


def test_a_misspelt_key_in_a_recipe_is_refused_with_its_full_name(mistake: Mistake, tmp_path: Path) -> None:
    write_recipe(tmp_path, "sft:\n  learning_rat: 0.5\n")
    message = mistake("--config-dir", str(tmp_path), "stage=sft", "recipe=mine")
    assert "recipe/mine" in message
    assert "sft.learning_rat" in message


def test_a_value_of_the_wrong_type_in_a_recipe_is_refused_with_its_full_key(mistake: Mistake, tmp_path: Path) -> None:
    write_recipe(tmp_path, "sft:\n  learning_rate: fast\n")
    message = mistake("--config-dir", str(tmp_path), "stage=sft", "recipe=mine")
    assert "sft.learning_rate" in message
    assert "fast" in message


UNKNOWN_CHOICES = {
    "recipe=smok": " Did you mean 'smoke'",
    "recipe=": "",
    "format=mxfp5": " Did you mean 'mxfp4'",
    "model=gpt_oss_12b": " Did you mean 'gpt_oss_120b'",
    "data=poems": "",
    "train@sft=lor": " Did you mean 'lora'",
    "train@qat=dora": " Did you mean 'lora'",
}


@pytest.mark.parametrize(("argument", "meant"), UNKNOWN_CHOICES.items())
def test_an_unknown_choice_of_a_group_is_refused_with_all_choices(argument: str, meant: str) -> None:
    message = one_line(found_on(argument))
    group = argument.partition("=")[0].partition("@")[0]
    folder = composition.RECIPES_DIR if group == "recipe" else program.CONF_DIR / group
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    assert message.startswith(f"{argument}: no such choice.{meant}")
    assert message.endswith(f" Choose from: {names}.")


def test_no_recipe_is_a_choice_too(seen: list[PipelineConfig]) -> None:
    assert run_program("stage=sft", "recipe=null", SYNTHETIC_DATA) in (0, 2)


def test_train_without_a_stage_is_refused_with_the_two_ways() -> None:
    message = one_line(found_on("train=lora"))
    assert message == "train: does not name a stage. Use train@sft=lora or train@qat=lora."


def test_an_unknown_stage_is_refused_with_all_stages() -> None:
    message = one_line(found_on("stage=sftt"))
    assert message == f"stage=sftt: no such choice. Did you mean 'sft'? Choose from: {', '.join(STAGES)}."
