"""Make enums with one member for each row of a table."""

from collections.abc import Iterable


def add_members(body: dict[str, object], names: Iterable[str]) -> None:
    """Add members to an enum, one for each name. Call it in the class body: `add_members(vars(), FORMATS)`.

    mypy does not see these members. Write `FormatName["mxfp4"]`, not `FormatName.mxfp4`.
    """
    for name in names:
        body[name] = name
