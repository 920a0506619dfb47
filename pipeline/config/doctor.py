"""`doctor`: the check of data and machine before training."""

from dataclasses import dataclass, field
from typing import Annotated

from pipeline.config.bounds import POSITIVE, Bound
from pipeline.config.languages import NAMES

_TWO_LANGUAGES = Bound("at least two different languages", lambda value: len(set(value)) >= 2)


@dataclass
class DoctorConfig:
    """Check the data and the machine before training."""

    row: Annotated[int, POSITIVE] = 1
    """Conversation to show token by token, counted from 1 over the whole data set."""
    languages: Annotated[list[str], _TWO_LANGUAGES] = field(default_factory=lambda: list(NAMES.values()))
    """Languages to detect in prompts, reasoning and answers, as ISO 639-1 codes. Fewer languages give surer results."""
