"""JSON values and files."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias, Union

Json: TypeAlias = Union[Mapping[str, "Json"], Sequence["Json"], str, float, bool, None]
"""A value that JSON can hold."""
