"""Bounds of settings. A bound is a part of the setting's type, as in `Annotated[float, POSITIVE]`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Bound:
    """A condition on one value. The value null always meets it.

    Attributes:
        meaning: the end of the message "<key>=<value>: must be …".
        holds: returns whether a value meets the condition.
        choices: all values that meet the condition, if the help should list them.
    """

    meaning: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def one_of(*choices: str) -> Bound:
    """Make the bound of a setting that takes only these words."""
    return Bound(f"one of {', '.join(choices)}", choices.__contains__, choices)


def bounds_of(section: type) -> dict[str, tuple[Bound, ...]]:
    """Field of a section -> its bounds."""
    hints = get_type_hints(section, include_extras=True)
    return {
        name: tuple(extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Bound))
        for name, hint in hints.items()
    }


POSITIVE = Bound("greater than 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Bound("0 or more", lambda value: 0 <= value < math.inf)
BETWEEN_0_AND_1 = Bound("between 0 and 1, both excluded", lambda value: 0 < value < 1)
BELOW_1 = Bound("0 or more and below 1", lambda value: 0 <= value < 1)
FROM_0_TO_1 = Bound("from 0 to 1", lambda value: 0 <= value <= 1)
ABOVE_0_UP_TO_1 = Bound("above 0 and up to 1", lambda value: 0 < value <= 1)
SEED = Bound("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)
NOT_EMPTY = Bound("some text", lambda value: bool(value.strip()))
