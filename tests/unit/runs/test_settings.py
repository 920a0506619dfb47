"""Settings are stored as OmegaConf would store them."""

import pytest
from composing import composed_quickly
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline import __main__ as program
from pipeline.config import PipelineConfig, rules
from pipeline.runs.settings import choose_settings, plain

LINES = [
    ("recipe=smoke_lora", "stage=all", "quantize.method=stochastic"),
    ("recipe=own_data", "stage=sft", "data.path=rows.jsonl", "+data.roles.human=user", "sft.learning_rate=1"),
]


@pytest.fixture(params=LINES, ids=["a recipe", "a mapping"])
def config(request: pytest.FixtureRequest) -> PipelineConfig:
    program.register()
    with composed_quickly(), initialize_config_dir(str(program.CONF_DIR), version_base="1.3"):
        return rules.resolve(compose("config", list(request.param)))


def test_plain_settings_are_those_of_omegaconf(config: PipelineConfig) -> None:
    checked = OmegaConf.structured(config)
    assert plain(config) == OmegaConf.to_container(checked, enum_to_str=True)
    assert OmegaConf.to_yaml(OmegaConf.create(plain(config))) == OmegaConf.to_yaml(checked)


def test_sections_and_settings_are_flattened(config: PipelineConfig) -> None:
    found = choose_settings(config, ("quantize", "sft.lora.targets", "data.validation.path"))
    stored = {f"quantize.{name}": value for name, value in plain(config.quantize).items()}
    others = {"sft.lora.targets": ["attention", "experts"], "data.validation.path": None}
    assert found == stored | others


def test_a_setting_of_a_section_that_is_null_is_null() -> None:
    assert choose_settings(PipelineConfig(), ("data.validation.columns.messages",)) == {
        "data.validation.columns.messages": None
    }


def test_recorded_entries_of_a_mapping_are_found_again() -> None:
    config = PipelineConfig()
    config.data.roles = {"human": "user", "a.b": "tool"}
    recorded = choose_settings(config, ("data.roles",))
    assert recorded == {"data.roles.human": "user", "data.roles.a.b": "tool"}
    assert choose_settings(config, recorded) == recorded


def test_a_setting_that_this_program_does_not_know_is_null() -> None:
    assert choose_settings(PipelineConfig(), ("data.of_another_version",)) == {"data.of_another_version": None}
