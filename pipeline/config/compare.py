"""Settings of `compare`: the report on evaluated models."""

from dataclasses import dataclass, field
from typing import Annotated, Optional

from pipeline.config.bounds import NOT_NEGATIVE, Bound

_POINTS = Bound("above 0 and below 100", lambda value: 0 < value < 100)
_NAMES = Bound("directories or patterns, none of them empty", lambda value: all(each.strip() for each in value))
_FOLDER = Bound("the name of one folder", lambda value: value.strip() not in ("", ".", "..") and "/" not in value)


@dataclass
class CompareConfig:
    """Write a report on the results of `evaluate`."""

    runs: Annotated[list[str], _NAMES] = field(default_factory=list)
    """Directories of the runs to compare. Patterns are allowed (runs/smoke/sweep/*); empty: this run."""
    name: Annotated[Optional[str], _FOLDER] = None
    """Name of a report on several runs, which is written to runs/comparisons/<name>; null: the names of the runs."""
    margin: Annotated[float, _POINTS] = 5.0
    """An export is as good as SFT if its answers exclude a loss of this many points of each pass rate."""
    examples: Annotated[int, NOT_NEGATIVE] = 20
    """Number of prompts whose answers are shown side by side. Prompts that only some models pass come first."""
