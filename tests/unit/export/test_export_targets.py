"""A new export target needs one row of TARGETS and one file. A row without a file is an error."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import export, verify
from pipeline.config import TinyConfig
from pipeline.config.targets import TARGETS
from pipeline.doctor import needs
from pipeline.export import EXPORTERS, import_exporters, recognize
from pipeline.export.job import Job
from pipeline.models.references import ModelRef
from pipeline.models.source import Source
from pipeline.models.tiny_model import create_tiny
from pipeline.models.weights import Weights
from pipeline.numerics.formats import MXFP4

TOY = '''
"""MXFP4 under other names."""

from pipeline.checkpoints.gpt_oss import expert_projections, other_tensors
from pipeline.export.exporter import Exporter
from pipeline.export.layout import others_layout, packed_stack
from pipeline.export.weights import open_base, others_piece, packed_piece, stacks, write_checkpoint
from pipeline.runs.artifacts import Kind


def write(job, directory):
    base = open_base(job)
    pieces = [others_piece(job, base, name, [name]) for name in other_tensors(base.shape)]
    pieces += [packed_piece(stack, *names(stack.projection)) for stack in stacks(job, base)]
    return write_checkpoint(job, base, directory, pieces=pieces, config=describe(base))


def names(projection):
    return f"{projection.name}.toy_codes", f"{projection.name}.toy_powers"


def layout(shape):
    return others_layout(shape) | {each.name: packed_stack(each, *names(each)) for each in expert_projections(shape)}


def describe(base, stored=()):
    return {**base.config, "is_toy": True}


EXPORTER = Exporter(write=write, kind=Kind.foreign, layout=layout, describe=describe, mark=".toy_codes")
'''

ROW = """
TARGETS["toy"] = Target(
    holds=("mxfp4",), expert_bits=MXFP4.bits_per_value, title="a toy", usage="toy {model}", tags=("toy",)
)
"""

ROOT = Path(__file__).parents[3]
AddTarget = Callable[[str | None], None]


@pytest.fixture
def add_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AddTarget]:
    """A function that adds the row `toy` to TARGETS, and writes a text to toy.py.

    If the text is None, no file is written.
    """
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.setattr(export, "__path__", [*export.__path__, str(files)])

    def add(text: str | None) -> None:
        monkeypatch.setitem(TARGETS, "toy", replace(TARGETS["mxfp4"], title="a toy"))
        if text is not None:
            (files / "toy.py").write_text(text, encoding="utf-8")

    yield add
    if sys.modules.pop("pipeline.export.toy", None) is not None:
        del export.toy  # type: ignore[attr-defined]


def test_every_target_has_the_exporter_of_its_file() -> None:
    assert list(EXPORTERS) == list(TARGETS)
    assert all(EXPORTERS[name] is sys.modules[f"pipeline.export.{name}"].EXPORTER for name in TARGETS)


def test_a_row_and_a_file_are_a_target_that_exports_and_is_proven(
    add_target: AddTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_target(TOY)
    monkeypatch.setitem(EXPORTERS, "toy", import_exporters()["toy"])
    tiny, directory = tmp_path / "tiny", tmp_path / "export"
    create_tiny(tiny, TinyConfig())
    directory.mkdir()
    job = Job(Weights(ModelRef("tiny", tiny, tiny)), Source(tiny, ""), MXFP4, 1 << 30, "cpu")
    written = EXPORTERS["toy"].write(job, directory)
    copied = [name for note in written.notes if note["is_copied"] for name in note["tensors"]]
    checks = verify.check_against_base(directory, "toy", tiny, copied)
    assert [(check.title, check.problems) for check in checks if check.status != "ok"] == []
    assert recognize(directory) == "toy"
    assert needs.export_bytes(job.weights.shape, "toy") == written.bytes


def test_a_row_without_a_file_is_an_error_that_names_both(add_target: AddTarget) -> None:
    add_target(None)
    with pytest.raises(ImportError, match=r"TARGETS has a row 'toy', but pipeline/export/toy\.py does not exist"):
        import_exporters()


@pytest.mark.parametrize("text", ["", "EXPORTER = 'no exporter'"])
def test_a_file_without_an_exporter_is_an_error_that_says_how_to_end_it(add_target: AddTarget, text: str) -> None:
    add_target(text)
    with pytest.raises(ImportError, match=r"pipeline/export/toy\.py has no EXPORTER\. End the file with EXPORTER = "):
        import_exporters()


def test_a_missing_import_of_a_file_is_not_reported_as_a_missing_file(add_target: AddTarget) -> None:
    add_target("import not_installed_here")
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        import_exporters()
