"""Find the version of an engine's program, and compare it with the versions that an export needs."""

import re
import subprocess
from pathlib import Path

from packaging.version import InvalidVersion, Version

from pipeline.config.engines import Server

_SECONDS = 20.0
_SCRIPT = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        pass
"""
_INTERPRETER = re.compile(r"""#!(/\S*python\S*)|'''exec' "?(/[^"]*?python[^" ]*)"? """)
"""The interpreter in a script that pip installed: on the first line, or on the second if the path is long."""


def describe_problem(program: Path, server: Server, target: str) -> str | None:
    """Return a message if the installed engine is older than an export needs, or None if it is not or is unknown.

    Args:
        program: the program that starts the engine.
        server: the engine.
        target: layout of the export.
    """
    found = find(program, server.distributions) if server.distributions else None
    if found is None:
        return None
    if (oldest := server.oldest.get(target)) is not None and _is_older(found, oldest):
        return (
            f"{program} is version {found}, which cannot load gpt-oss with export.target={target}. It needs {oldest} or"
            f" newer: {server.install}."
        )
    if server.oldest_rendering and _is_older(found, server.oldest_rendering):
        return (
            f"{program} is version {found}, whose chat prompts differ from those of training. Use"
            f" {server.oldest_rendering} or newer: {server.install}. The completions API is not affected."
        )
    return None


def find(program: Path, distributions: tuple[str, ...]) -> str | None:
    """Return the version of the Python package that a program belongs to, or None if it cannot be known.

    The interpreter in the program's first lines is asked, because the engine has a Python environment of its own.
    """
    python = _interpreter(program)
    if python is None:
        return None
    try:
        answer = subprocess.run(
            [python, "-c", _SCRIPT, *distributions],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
            cwd=program.parent,
        )
    except (OSError, subprocess.SubprocessError):  # the engine's own start then says what is wrong
        return None
    return answer.stdout.strip() or None


def _interpreter(program: Path) -> str | None:
    try:
        with program.open("rb") as file:
            head = file.read(4096).decode("utf-8", errors="replace")
    except OSError:
        return None
    found = _INTERPRETER.match(head) or (_INTERPRETER.search(head) if head.startswith("#!/bin/sh") else None)
    return None if found is None else found[1] or found[2]


def _is_older(found: str, oldest: str) -> bool:
    """Whether a version is older. A development version may have any number, so it counts as new enough."""
    try:
        version = Version(found)
    except InvalidVersion:
        return False
    return not version.is_devrelease and version.release < Version(oldest).release
