"""Reads the results file, and combines cells to the figures of the page. Each figure has one value for each seed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.rounding_study.statistics import Estimate, estimate, estimate_ratio


@dataclass(frozen=True)
class Results:
    """The content of the results file."""

    record: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read the file.

        Raises:
            ValueError: it has no complete seed.
        """
        record = json.loads(path.read_text(encoding="utf-8"))
        if not record["seeds"]:
            raise ValueError(f"{path} has no complete seed")
        return cls(record)

    @property
    def seeds(self) -> list[str]:
        """Numbers of the seeds."""
        return list(self.record["seeds"])

    def values(self, cell: str, figure: str) -> list[float]:
        """Return a figure of a cell for each seed."""
        return [seed["cells"][cell][figure] for seed in self.record["seeds"].values()]

    def mean(self, cell: str, figure: str) -> Estimate:
        """Estimate the mean of a figure."""
        return estimate(self.values(cell, figure))

    def difference(self, cell: str, other: str, figure: str = "loss") -> Estimate:
        """Estimate the mean of figure(cell) - figure(other), paired by seed."""
        pairs = zip(self.values(cell, figure), self.values(other, figure), strict=True)
        return estimate([one - two for one, two in pairs])

    def ratio(self, cell: str, other: str, figure: str = "kl") -> Estimate:
        """Estimate figure(cell) / figure(other)."""
        return estimate_ratio(self.values(cell, figure), self.values(other, figure))

    def closed(self, cell: str, more: str) -> Estimate:
        """Estimate the share of the gap that a cell closes. `more` names the control, without its rounding.

        The gap is loss(more SFT, nearest) - loss(more SFT, unrounded).
        """
        found, near, none = (self.values(name, "loss") for name in (cell, f"{more}/nearest", f"{more}/none"))
        gained = [one - two for one, two in zip(near, found, strict=True)]
        gap = [one - two for one, two in zip(near, none, strict=True)]
        return estimate_ratio(gained, gap)

    def gained(self, cell: str, other: str, before: str) -> Estimate:
        """Estimate the gain of a cell, loss(before) - loss(cell), as a share of another cell's gain."""
        losses = self.values(before, "loss")
        gains = [
            [start - end for start, end in zip(losses, self.values(name, "loss"), strict=True)]
            for name in (cell, other)
        ]
        return estimate_ratio(gains[0], gains[1])
