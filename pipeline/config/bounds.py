"""Bounds of settings. A setting declares a bound in its type, as in `Annotated[float, POSITIVE]`.

Texts must not be empty, without any bound (`rules.problems`). An empty path would mean the working directory.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Bound:
    """A condition on one value. null always meets the condition.

    Attributes:
        meaning: the condition in words. It completes the message "<key>=<value>: must be …".
        holds: function that returns whether a value meets the condition.
        choices: all values that meet the condition, or () if the help should not list them.
    """

    meaning: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Composed:
    """The default of a setting in conf/config.yaml, for the help. It replaces the default of the field.

    Attributes:
        default: text of the default, as conf/config.yaml has it.
    """

    default: str


def one_of(*choices: str) -> Bound:
    """Make a bound for a setting that accepts only these words."""
    return Bound(f"one of {', '.join(choices)}", choices.__contains__, choices)


@cache
def bounds_of(section: type) -> dict[str, tuple[Bound, ...]]:
    """Return the bounds of each field of a section, by the field's name."""
    hints = get_type_hints(section, include_extras=True)
    return {
        name: tuple(extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Bound))
        for name, hint in hints.items()
    }


@cache
def composed_defaults(section: type) -> dict[str, str]:
    """Return the defaults of a section that conf/config.yaml sets, by the field's name."""
    hints = get_type_hints(section, include_extras=True)
    return {
        name: extra.default
        for name, hint in hints.items()
        for extra in getattr(hint, "__metadata__", ())
        if isinstance(extra, Composed)
    }


POSITIVE = Bound("greater than 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Bound("0 or more", lambda value: 0 <= value < math.inf)
BETWEEN_0_AND_1 = Bound("between 0 and 1, both excluded", lambda value: 0 < value < 1)
BELOW_1 = Bound("0 or more and below 1", lambda value: 0 <= value < 1)
FROM_0_TO_1 = Bound("from 0 to 1", lambda value: 0 <= value <= 1)
ABOVE_0_UP_TO_1 = Bound("above 0 and up to 1", lambda value: 0 < value <= 1)
SEED = Bound("from 0 to 4294967295", lambda value: 0 <= value < 2**32)
