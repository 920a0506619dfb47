"""Checks the tensors that an export lists as copied from the base model."""

from pipeline.export.layout import View
from pipeline.verify.check import Check


def check_untouched(export: View, same: set[str], copied: list[str]) -> Check:
    """Check that each tensor in the list of copied tensors has the same bits as in the base model.

    Args:
        export: view of the export. Only its layout is used.
        same: names of the tensors of the plain layout that are bit-identical to the base model's.
        copied: names of the stored tensors that the export lists as copied.
    """
    check = Check("untouched tensors: the base model's own, bit for bit")
    said = set(copied)
    claimed = {name: set(held.tensors) for name, held in export.layout.items() if held.tensors.keys() <= said}
    check.problems = [
        f"{name}: listed as copied from the base model, but differs from it" for name in claimed if name not in same
    ]
    unknown = said - {stored for tensors in claimed.values() for stored in tensors}
    check.problems += [f"{name}: listed as copied from the base model, but missing" for name in sorted(unknown)]
    check.measured["tensors"] = len(claimed)
    return check
