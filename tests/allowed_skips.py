"""Fail a CI run if a test was skipped for a reason that is not allowed.

Otherwise a missing package would leave code untested, and the run would still pass. `conftest.py` imports both hooks.
With pytest-xdist the hooks see the skips of all workers, because workers report to the main process.
"""

import os
from typing import Any

import pytest

ALLOWED_REASONS = (
    "needs a CUDA device",
    "needs compute capability ",
    "needs a machine without a GPU",
    "needs direct I/O",
    "needs /proc of Linux",
    "needs shared test data: ",
    "needs the machine of the record: ",
    "engine in an environment of its own: ",
    "needs the shell ",
    "needs Linux on x86-64 and a C compiler",
)
"""The reason of an allowed skip begins with one of these texts."""


def forbidden_skips(config: pytest.Config) -> list[str]:
    """List the skips that CI does not allow, each as "file:line: reason".

    The list is empty outside CI and in pytest-xdist's workers, which have no terminal reporter.
    """
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or os.environ.get("CI") != "true":
        return []
    skips = [report.longrepr for report in reporter.stats.get("skipped", [])]
    reasons = [(path, line, reason.removeprefix("Skipped: ")) for path, line, reason in skips]
    found = {f"{path}:{line}: {why}" for path, line, why in reasons if not why.startswith(ALLOWED_REASONS)}
    return sorted(found)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) and forbidden_skips(
        session.config
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = forbidden_skips(config)
    if not found:
        return
    terminalreporter.section("skips that CI does not allow", red=True)
    for line in found:
        terminalreporter.line(line)
    terminalreporter.line("Install what is missing (pyproject.toml, extra test), or see tests/allowed_skips.py.")
