"""Check that an export is correct: its files, its distance from the base model, and its weights.

The checks must find wrong exports, because engines load many of them without a warning. The code that wrote the export
may be wrong itself. So other projects' code decodes the weights: transformers for MXFP4, ModelOpt for NVFP4, and
llama.cpp's package for GGUF. The trained values are taken from the forward pass of the fake-quantized model, and PEFT
merges the adapters.

Each layout maps the tensors of the plain layout to its stored tensors. So all layouts go through the same checks.
"""

from collections.abc import Mapping
from pathlib import Path

from pipeline.checkpoints.reading import Checkpoint
from pipeline.export import EXPORTERS
from pipeline.export.layout import View, view_base
from pipeline.verify.check import Check
from pipeline.verify.distance import compare
from pipeline.verify.files import check_files, check_tensors, check_trained_files, check_unchanged
from pipeline.verify.untouched import check_untouched

__all__ = [
    "Check",
    "check_against_base",
    "check_files",
    "check_tensors",
    "check_trained_files",
    "check_unchanged",
    "view_export",
]


def check_against_base(
    directory: Path,
    target: str,
    base: Path,
    copied: list[str] | None = None,
    own: Mapping[str, Path | None] | None = None,
) -> list[Check]:
    """Check an export against its base model. Weights are read only if the names and shapes of the tensors are right.

    Args:
        directory: directory of the export.
        target: layout of the export, a row of EXPORTERS.
        base: directory of the base model.
        copied: names of the stored tensors that the export lists as copied from the base model. None if the export has
            no list.
        own: see `check_files`.
    """
    layout, reference = EXPORTERS[target], Checkpoint(base)
    tensors, files = check_tensors(directory, layout, reference), check_files(directory, target, reference, own)
    if tensors.status != "ok":
        return [tensors, files, Check("weights", skipped="names, shapes or types of tensors are wrong")]
    export = view_export(directory, target, base)
    found = compare(export, view_base(base))
    checks = [tensors, files, found.distance]
    return checks if copied is None else [*checks, check_untouched(export, found.same, copied)]


def view_export(directory: Path, target: str, base: Path) -> View:
    """Open the weights of an export whose tensors have been checked.

    Raises:
        UserError: a file cannot be read.
    """
    shape = Checkpoint(base).shape
    return View(EXPORTERS[target].open(directory), EXPORTERS[target].layout(shape), shape)
