"""The house keeps its limits: sizes of files and functions, signatures with `Any`, the packages, and the README."""

import ast
from functools import cache
from pathlib import Path

from tests.house import functions, lines_of, listed_entries, parse, sources, uses_any

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pipeline"
MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_README_LINES = 400, 40, 150
MOST_WITH_ANY = 100
"""Signatures with `Any` in pipeline/. Libraries without types, and JSON that anybody wrote, need some."""
NOT_LISTED = {"__init__.py", "__pycache__", "py.typed"}


@cache
def counted() -> tuple[dict[str, int], int]:
    """Return the lines of each function by its place, and the number of signatures with `Any`."""
    lines, with_any = dict[str, int](), 0
    for path in sources(PACKAGE):
        for function in functions(parse(path)):
            lines[f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"] = lines_of(function)
            with_any += uses_any(function)
    return lines, with_any


def test_no_file_of_the_program_is_longer_than_400_lines() -> None:
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in sources(PACKAGE)}

    assert {str(path): count for path, count in lines.items() if count > MOST_FILE_LINES} == {}


def test_no_function_of_the_program_is_longer_than_40_lines() -> None:
    lines, _ = counted()

    assert {place: count for place, count in lines.items() if count > MOST_FUNCTION_LINES} == {}


def test_at_most_100_signatures_of_the_program_use_any() -> None:
    _, with_any = counted()

    assert 0 < with_any <= MOST_WITH_ANY


def test_the_top_of_the_program_holds_what_the_page_on_its_architecture_lists() -> None:
    listed = listed_entries((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))

    assert {path.name for path in PACKAGE.iterdir()} - NOT_LISTED == listed


def test_the_readme_has_at_most_150_lines() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= MOST_README_LINES


def test_counting_finds_every_function_and_every_any() -> None:
    source = '''
async def first(given: "dict[str, Any]") -> int:
    """Two lines."""
    def inner(*more: list[Any]) -> None: ...

class Some:
    if True:
        def second(self, *, a: typing.Any) -> None: ...
    else:
        def third(self, text: str = "Any", **others: "Anything") -> int: ...
        def fourth(self) -> Callable[..., Any]: ...
'''
    found = list(functions(ast.parse(source)))

    assert {each.name: uses_any(each) for each in found} == {
        "first": True,
        "inner": True,
        "second": True,
        "third": False,
        "fourth": True,
    }
    assert [lines_of(each) for each in found] == [3, 1, 1, 1, 1]
