"""What can be chosen in the configuration is what there is in the tables of records."""

from pathlib import Path

from pipeline.config import ExportTarget, FormatName, ScaleRule
from pipeline.export import EXPORTERS
from pipeline.numerics.formats import FORMATS, SCALE_RULES
from pipeline.rules import _SCALE_RULES

CONF = Path(__file__).parents[2] / "conf"


def test_every_format_can_be_chosen() -> None:
    assert [name.value for name in FormatName] == list(FORMATS)
    assert sorted(path.stem for path in (CONF / "format").glob("*.yaml")) == sorted(FORMATS)
    assert all(name == block_format.name for name, block_format in FORMATS.items())


def test_every_export_target_can_be_chosen() -> None:
    assert [target.value for target in ExportTarget] == list(EXPORTERS)


def test_every_rule_of_a_format_can_be_chosen_for_it_and_no_other() -> None:
    chosen = {name.value: tuple(rule.value for rule in rules) for name, rules in _SCALE_RULES.items()}
    assert chosen == {name: SCALE_RULES[row.scale_type] for name, row in FORMATS.items()}
    assert {rule.value for rule in ScaleRule} == {rule for rules in SCALE_RULES.values() for rule in rules}
