"""Counts what the house limits: lines of files and functions, and signatures with `Any`."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield all functions and methods, also those inside other functions. Only statements are visited."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        if isinstance(node, ast.stmt | ast.excepthandler | ast.match_case):
            yield from functions(node)


def uses_any(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether an annotation of a parameter or of the result contains `Any`."""
    given = function.args
    each = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    annotations = [argument.annotation for argument in each if argument is not None] + [function.returns]
    return any(_is_any(node) for found in annotations if found is not None for node in ast.walk(found))


def _is_any(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a forward reference
        return any(_is_any(inner) for inner in ast.walk(ast.parse(node.value, mode="eval")))
    return (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.Attribute) and node.attr == "Any")


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function, with its docstring and without its decorators."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def listed_entries(page: str) -> set[str]:
    """Return the entries at the top of `pipeline/` that the tree of docs/architecture.md lists."""
    tree = page.partition("\npipeline/\n")[2].partition("\nconf/")[0]
    return {line.split()[0].removesuffix("/") for line in tree.splitlines() if line.startswith("  ")}


@cache
def parse(path: Path) -> ast.Module:
    """Parse a source. The tests of one process share the result, because parsing the program takes a second."""
    return ast.parse(path.read_text(encoding="utf-8"))


def sources(package: Path) -> list[Path]:
    """List the Python files of a package."""
    return sorted(package.rglob("*.py"))
