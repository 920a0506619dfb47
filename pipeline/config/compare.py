"""`compare`: the report on measured models."""

from dataclasses import dataclass, field
from typing import Annotated

from pipeline.config.bounds import NOT_NEGATIVE


@dataclass
class CompareConfig:
    """Report what `evaluate` measured."""

    runs: list[str] = field(default_factory=list)
    """Runs to compare: directories, or patterns of directories (runs/smoke/sweep/*); empty: this run."""
    examples: Annotated[int, NOT_NEGATIVE] = 20
    """Prompts whose answers are shown side by side. Prompts on which the models differ come first."""
