"""The proof that an export is right, as checks of its files, of its distance from the base model, of its weights.

Engines load many wrong checkpoints without a word, so nothing here trusts the code that wrote the export: MXFP4 is
decoded by transformers' own routine, the trained values are those that the fake-quantized model's forward pass really
used, and adapters are merged by PEFT.
"""

from pathlib import Path

from pipeline.proof.check import Check
from pipeline.proof.distance import check_distance
from pipeline.proof.files import check_files, check_tensors, check_unchanged
from pipeline.proof.stored import check_copied, check_scales
from pipeline.proof.trained import TrainedModel

__all__ = [
    "Check",
    "TrainedModel",
    "against_base",
    "check_copied",
    "check_distance",
    "check_files",
    "check_scales",
    "check_tensors",
    "check_unchanged",
]


def against_base(directory: Path, base: Path) -> list[Check]:
    """All that the base model tells of an export; of tensors that are not those of the layout no weights are read."""
    tensors, files = check_tensors(directory, base), check_files(directory, base)
    if tensors.status != "ok":
        return [tensors, files, Check("weights", skipped="the tensors are not those of the layout")]
    return [tensors, files, check_scales(directory), check_distance(directory, base)]
