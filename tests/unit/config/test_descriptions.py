"""Every setting has a description, and docs/configuration.md shows them all."""

import runpy
from pathlib import Path

import pytest

from pipeline.config.descriptions import Description, describe_settings
from pipeline.config.keys import setting_keys

ROOT = Path(__file__).parents[3]
SETTINGS = {each.key: each for each in describe_settings()}


def test_every_setting_is_described_once() -> None:
    described = [each.key for each in describe_settings()]
    sections = {key.rpartition(".")[0] for key in setting_keys()}
    assert [key for key in described if "[]" not in key] == [key for key in setting_keys() if key not in sections]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda each: each.key)
def test_a_meaning_is_a_sentence(setting: Description) -> None:
    assert setting.meaning[0].isupper() or setting.meaning.split()[0].strip(",:;") in setting.choices
    assert setting.meaning.endswith((".", ".)", "}."))
    assert "\n" not in setting.meaning


def test_choices_defaults_and_limits_are_those_of_the_section() -> None:
    precision = SETTINGS["sft.precision"]
    assert (precision.default, precision.choices) == ("mixed_bf16", ("fp32", "mixed_bf16", "bf16"))
    assert SETTINGS["model.path"].default == "required"
    assert SETTINGS["data.validation_fraction"].limits == ("between 0 and 1, both excluded",)
    assert SETTINGS["qat.distillation.weight"].limits == ("from 0 to 1",)


def test_the_page_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "configuration_page"))["page"]()
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == page, "run scripts/configuration_page"
