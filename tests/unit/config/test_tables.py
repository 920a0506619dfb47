"""The choices of the settings are the rows of the tables."""

from pathlib import Path

from pipeline.config import (
    EndpointApi,
    ExportTarget,
    FormatConfig,
    FormatName,
    PipelineConfig,
    ScaleRule,
    Sharding,
    Stage,
    rules,
)
from pipeline.evaluate.generation.endpoint import APIS
from pipeline.export import EXPORTERS
from pipeline.models.sharding import STRATEGIES
from pipeline.numerics.formats import FORMATS, SCALE_RULES

CONF = Path(__file__).parents[3] / "conf"


def test_every_format_can_be_chosen() -> None:
    assert [name.value for name in FormatName] == list(FORMATS)
    assert sorted(path.stem for path in (CONF / "format").glob("*.yaml")) == sorted(FORMATS)
    assert all(name == block_format.name for name, block_format in FORMATS.items())


def test_every_export_target_can_be_chosen() -> None:
    assert [target.value for target in ExportTarget] == list(EXPORTERS)


def problems(name: FormatName, rule: ScaleRule) -> list[str]:
    return rules.problems(PipelineConfig(Stage.qat, format=FormatConfig(name, rule)))


def test_every_rule_of_a_format_can_be_chosen_for_it_and_no_other() -> None:
    chosen = {name.value: tuple(rule.value for rule in ScaleRule if not problems(name, rule)) for name in FormatName}
    assert {name: set(rules) for name, rules in chosen.items()} == {
        name: set(SCALE_RULES[row.scale_type]) for name, row in FORMATS.items()
    }
    refused = [
        problem
        for name in FormatName
        for rule in ScaleRule
        if rule.value not in chosen[name.value]
        for problem in problems(name, rule)
    ]
    assert refused == ["format.scale_rule=nearest: mxfp4 has ceil, floor, mse."]
    assert {rule.value for rule in ScaleRule} == {rule for rules in SCALE_RULES.values() for rule in rules}


def test_every_api_of_an_endpoint_and_every_sharding_has_its_row() -> None:
    assert set(APIS) == set(EndpointApi.__members__)
    assert set(STRATEGIES) == set(Sharding)
