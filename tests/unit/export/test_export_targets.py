"""A new export target takes one row of TARGETS and one file. A row without its file is an error."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import export, verify
from pipeline.config import TinyConfig
from pipeline.config.targets import TARGETS
from pipeline.doctor import needs
from pipeline.export import EXPORTERS, exporters, recognized
from pipeline.export.job import Job
from pipeline.models.references import ModelRef
from pipeline.models.source import Source
from pipeline.models.tiny_model import create_tiny
from pipeline.models.weights import Weights
from pipeline.numerics.formats import MXFP4

TOY = '''
"""MXFP4 under names of its own."""

from pipeline.runs.artifacts import Kind
from pipeline.export.exporter import Exporter
from pipeline.export.layout import others, packed
from pipeline.export.weights import checked_base, others_piece, packed_piece, stacks, write_checkpoint
from pipeline.checkpoints.gpt_oss import expert_projections, other_tensors


def write(job, directory):
    base = checked_base(job)
    pieces = [others_piece(job, base, name, [name]) for name in other_tensors(base.shape)]
    pieces += [packed_piece(stack, *names(stack.projection)) for stack in stacks(job, base)]
    return write_checkpoint(job, base, directory, pieces, described(base))


def names(projection):
    return f"{projection.name}.toy_codes", f"{projection.name}.toy_powers"


def layout(shape):
    return others(shape) | {each.name: packed(each, *names(each)) for each in expert_projections(shape)}


def described(base, stored=()):
    return {**base.config, "is_toy": True}


EXPORTER = Exporter(write=write, kind=Kind.foreign, layout=layout, described=described, mark=".toy_codes")
'''

AddTarget = Callable[[str | None], None]


@pytest.fixture
def add_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AddTarget]:
    """Gives TARGETS a row `toy`, and pipeline/export a file toy.py with this text; None: no such file."""
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
    monkeypatch.setitem(EXPORTERS, "toy", exporters()["toy"])
    tiny, directory = tmp_path / "tiny", tmp_path / "export"
    create_tiny(tiny, TinyConfig())
    directory.mkdir()
    job = Job(Weights(ModelRef("tiny", tiny, tiny)), Source(tiny, ""), MXFP4, 1 << 30, "cpu")
    written = EXPORTERS["toy"].write(job, directory)
    copied = [name for note in written.notes if note["is_copied"] for name in note["tensors"]]
    checks = verify.against_base(directory, "toy", tiny, copied)
    assert [(check.title, check.problems) for check in checks if check.status != "ok"] == []
    assert recognized(directory) == "toy"
    assert needs.export_bytes(job.weights.shape, "toy") == written.bytes


def test_a_row_without_a_file_is_an_error_that_names_both(add_target: AddTarget) -> None:
    add_target(None)
    with pytest.raises(ImportError, match=r"TARGETS has a row 'toy', but pipeline/export/toy\.py does not exist"):
        exporters()


@pytest.mark.parametrize("text", ["", "EXPORTER = 'no exporter'"])
def test_a_file_without_an_exporter_is_an_error_that_says_how_to_end_it(add_target: AddTarget, text: str) -> None:
    add_target(text)
    with pytest.raises(ImportError, match=r"pipeline/export/toy\.py has no EXPORTER\. End the file with EXPORTER = "):
        exporters()


def test_a_file_that_imports_what_is_missing_is_not_said_to_be_missing_itself(add_target: AddTarget) -> None:
    add_target("import not_installed_here")
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        exporters()
