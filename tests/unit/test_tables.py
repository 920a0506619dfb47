"""What can be chosen in the configuration is what there is in the tables of records."""

from pathlib import Path

from pipeline.config import ExportTarget, FormatName
from pipeline.export import EXPORTERS
from pipeline.numerics.formats import FORMATS

CONF = Path(__file__).parents[2] / "conf"


def test_every_format_can_be_chosen() -> None:
    assert [name.value for name in FormatName] == list(FORMATS)
    assert sorted(path.stem for path in (CONF / "format").glob("*.yaml")) == sorted(FORMATS)
    assert all(name == block_format.name for name, block_format in FORMATS.items())


def test_every_export_target_can_be_chosen() -> None:
    assert [target.value for target in ExportTarget] == list(EXPORTERS)
