"""The proof that an export is right: checks of its files, of its distance from the base model, and of its weights.

It must not trust the code that wrote the export: engines load many wrong checkpoints without a warning. Others
decode the weights (transformers MXFP4, ModelOpt NVFP4, llama.cpp's package GGUF). The trained values are those that the
fake-quantized model's forward pass really used. PEFT merges the adapters. All layouts go through the same checks: each
says which of its tensors hold which tensor of the plain layout.
"""

from pathlib import Path

from pipeline.checkpoints.reading import Checkpoint
from pipeline.export import EXPORTERS
from pipeline.export.layout import View, of_base
from pipeline.verify.check import Check
from pipeline.verify.distance import compare
from pipeline.verify.files import check_files, check_tensors, check_unchanged
from pipeline.verify.trained import TrainedModel
from pipeline.verify.untouched import check_untouched

__all__ = ["Check", "TrainedModel", "against_base", "check_files", "check_tensors", "check_unchanged", "viewed"]


def against_base(directory: Path, target: str, base: Path, copied: list[str] | None = None) -> list[Check]:
    """All that the base model tells of an export; of tensors that are not those of the layout no weights are read.

    Args:
        directory: of the export.
        target: its layout, a row of EXPORTERS.
        base: the base model.
        copied: stored tensors that the export says are the base model's own; None: it says nothing of that.
    """
    layout, reference = EXPORTERS[target], Checkpoint(base)
    tensors, files = check_tensors(directory, layout, reference), check_files(directory, layout, reference)
    if tensors.status != "ok":
        return [tensors, files, Check("weights", skipped="the tensors are not those of the layout")]
    export = viewed(directory, target, base)
    found = compare(export, of_base(base))
    checks = [tensors, files, found.distance]
    return checks if copied is None else [*checks, check_untouched(export, found.same, copied)]


def viewed(directory: Path, target: str, base: Path) -> View:
    """The weights of an export, whose tensors have been checked.

    Raises:
        UserError: a file cannot be read.
    """
    shape = Checkpoint(base).shape
    return View(EXPORTERS[target].open(directory), EXPORTERS[target].layout(shape), shape)
