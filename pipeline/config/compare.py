"""Settings of `compare`: the report on evaluated models."""

from dataclasses import dataclass, field
from typing import Annotated

from pipeline.config.bounds import NOT_NEGATIVE


@dataclass
class CompareConfig:
    """Write a report on the results of `evaluate`."""

    runs: list[str] = field(default_factory=list)
    """Directories of the runs to compare. Patterns are allowed (runs/smoke/sweep/*); empty: this run."""
    examples: Annotated[int, NOT_NEGATIVE] = 20
    """Number of prompts whose answers are shown side by side. Prompts that only some models pass come first."""
