"""Tensors that training did not touch: what an export says are the base model's own."""

from pipeline.export.layout import View
from pipeline.verify.check import Check


def check_untouched(export: View, same: set[str], copied: list[str]) -> Check:
    """What the export says is the base model's own.

    Args:
        export: whose layout says which tensor is stored where.
        same: tensors of the plain layout that were found to be the base model's to the bit.
        copied: stored tensors that are said to be.
    """
    check = Check("untouched tensors: the base model's own, bit for bit")
    said = set(copied)
    claimed = {name: set(held.tensors) for name, held in export.layout.items() if held.tensors.keys() <= said}
    check.problems = [f"{name}: said to be the base model's own, but is not" for name in claimed if name not in same]
    unknown = said - {stored for tensors in claimed.values() for stored in tensors}
    check.problems += [f"{name}: said to be the base model's own, but is not there" for name in sorted(unknown)]
    check.measured["tensors"] = len(claimed)
    return check
