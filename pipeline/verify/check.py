"""The result of one check of an export."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Check:
    """The result of one check of an export.

    Attributes:
        title: description of the check.
        problems: descriptions of errors; empty if the check passed.
        measured: measured figures, also of a failed check.
        tensors: tensor name -> figures of the tensor. Only the report shows them.
        stated: key of a description -> the expected and the found value. Only the report shows them.
        skipped: reason why the check did not run, or None.
        unseen: what the check does not cover, or None.
    """

    title: str
    problems: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    stated: dict[str, dict[str, Any]] = field(default_factory=dict)
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
        """Why errors may remain: the reason for skipping the check, or `unseen`. None if there is neither."""
        return f"{self.title}: {self.skipped}" if self.skipped else self.unseen
