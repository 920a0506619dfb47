"""Settings of `doctor`: the check of data and machine before training."""

from dataclasses import dataclass, field
from typing import Annotated

from pipeline.config.bounds import POSITIVE, Bound
from pipeline.config.languages import NAMES

_TWO_LANGUAGES = Bound("at least two different languages", lambda value: len(set(value)) >= 2)


@dataclass
class DoctorConfig:
    """Check the data and the machine before training."""

    row: Annotated[int, POSITIVE] = 1
    """Number of the conversation to show token by token. Numbers start at 1 and run through the whole data set."""
    languages: Annotated[list[str], _TWO_LANGUAGES] = field(default_factory=lambda: list(NAMES.values()))
    """Languages to detect in prompts, reasoning and answers, as ISO 639-1 codes. A short list gives fewer errors."""
