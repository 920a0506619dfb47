"""The result of one part of the proof."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Check:
    """One part of the proof.

    Attributes:
        title: the comparison, in words.
        problems: descriptions of errors; empty if the check passed.
        measured: figures, whether the check passed or not.
        tensors: tensor name -> figures. Only the report has them.
        skipped: reason why the check did not run, or None.
        unseen: remaining uncertainty after the check passed, or None.
    """

    title: str
    problems: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    skipped: str | None = None
    unseen: str | None = None

    @property
    def status(self) -> str:
        """`ok`, `FAILED` or `not checked`."""
        if self.problems:
            return "FAILED"
        return "not checked" if self.skipped else "ok"

    @property
    def gap(self) -> str | None:
        """The remaining uncertainty: the check was skipped, or it cannot see everything."""
        return f"{self.title}: {self.skipped}" if self.skipped else self.unseen
