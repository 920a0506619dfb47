"""QAT's learning rate follows SFT's, unless the user gives a number."""

import re
from pathlib import Path

import pytest
from conftest import run_program
from omegaconf import OmegaConf

from config.composing import SYNTHETIC_DATA, resolved
from pipeline.config import PipelineConfig, Stage, rates
from pipeline.config.composition import CONF_DIR, RECIPES_DIR
from pipeline.config.descriptions import describe_settings
from pipeline.config.rules import resolve
from pipeline.errors import UserError

BASE = ("stage=qat", SYNTHETIC_DATA)


def rate(*overrides: str) -> float:
    return resolved(*BASE, *overrides).qat.learning_rate


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ((), 6.6e-6),
        (("train@sft=lora", "train@qat=lora"), 6.6e-5),
        (("train@qat=bf16_parts",), 6.6e-6),
        (("train@sft=lora", "train@qat=bf16_parts"), 6.6e-6),
        (("train@sft=lora",), 6.6e-6),
        (("train@qat=lora",), 6.6e-5),
        (("train@sft=bf16_parts", "train@qat=lora", "format=nvfp4"), 6.6e-5),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
def test_the_rate_is_a_third_of_sfts(settings: tuple[str, ...], wanted: float) -> None:
    assert rate(*settings) == wanted


def test_the_rate_follows_sfts_rate() -> None:
    assert rate("sft.learning_rate=3e-3") == 9.9e-4
    assert rate("sft.learning_rate=1e-4", "train@sft=lora", "train@qat=lora") == 3.3e-5


def test_the_rate_follows_the_setting_of_sft_also_if_sft_does_not_run() -> None:
    assert rate("quantize.source=upcast", "sft.learning_rate=3e-5") == 9.9e-6


def test_a_number_given_by_the_user_is_kept() -> None:
    assert rate("qat.learning_rate=7e-5", "sft.learning_rate=1", "train@sft=lora") == 7e-5


def test_the_user_chooses_another_fraction() -> None:
    assert rate("qat.learning_rate=${rate_of_sft:0.5}") == 1e-5
    assert rate("qat.learning_rate=${rate_of_sft:0.5}", "train@sft=lora", "train@qat=lora") == 1e-4


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES_DIR.glob("*.yaml")))
def test_recipes_state_no_rate_of_qat_except_the_smoke_recipes(recipe: str) -> None:
    found = resolved("stage=qat", f"recipe={recipe}", SYNTHETIC_DATA)
    share = found.qat.learning_rate / rates.convert(found.sft.learning_rate, found.sft.method, found.qat.method)
    if recipe.startswith("smoke"):
        assert found.qat.learning_rate == 1e-4
    else:
        assert share == pytest.approx(0.33)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("qat.learning_rate=${rate_of_sft:fast}", "qat.learning_rate: .*needs a number.*was given 'fast'"),
        ("qat.learning_rate=${rate_of_sft:}", "qat.learning_rate: .*was given nothing"),
        ("qat.learning_rate=${rate_of_sft:1,2}", "qat.learning_rate: .*was given 1, 2"),
        ("qat.learning_rate=${rate_of_sft:true}", "qat.learning_rate: .*was given True"),
        ("qat.learning_rate=${rate_of_sft:0}", "qat.learning_rate=0.0: must be greater than 0"),
        ("sft.learning_rate=${rate_of_sft:1}", "sft.learning_rate: .*depends on itself. Set .* to a number"),
        ("sft.learning_rate=${qat.learning_rate}", "sft.learning_rate: .*depends on itself"),
    ],
)
def test_a_wrong_fraction_is_the_users_mistake(
    given: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program("stage=qat", "recipe=own_data", SYNTHETIC_DATA, f"run_dir={tmp_path}", given) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_a_method_without_a_fraction_is_named() -> None:
    composed = OmegaConf.structured(PipelineConfig(stage=Stage.qat))
    rates.register()
    OmegaConf.update(composed, "qat.learning_rate", "${rate_of_sft:{lora:0.2}}")
    with pytest.raises(UserError, match=r"a number for qat.method=full, as in \$\{rate_of_sft:\{full:0.2\}\}"):
        resolve(composed)


def test_the_help_shows_the_default_of_conf() -> None:
    (shown,) = (each.default for each in describe_settings() if each.key == "qat.learning_rate")
    node = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "config.yaml"), resolve=False)
    assert isinstance(node, dict) and shown == node["qat"]["learning_rate"]
