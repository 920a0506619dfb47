"""What one part of the proof found."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Check:
    """One part of the proof.

    Attributes:
        title: what was compared.
        problems: what is wrong; empty when it passed.
        measured: figures, passed or not.
        tensors: figures of each tensor, by name; for the report alone.
        skipped: why it could not be checked, or None.
        unseen: what is not known even though it passed, or None.
    """

    title: str
    problems: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    skipped: str | None = None
    unseen: str | None = None

    @property
    def status(self) -> str:
        """ok, FAILED or not checked."""
        if self.problems:
            return "FAILED"
        return "not checked" if self.skipped else "ok"

    @property
    def gap(self) -> str | None:
        """What remains unknown, whether because nothing was checked or because such a check cannot see it."""
        return f"{self.title}: {self.skipped}" if self.skipped else self.unseen
