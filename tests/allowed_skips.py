"""Fails a run of CI in which a test was skipped for a reason that is not allowed.

A missing package would otherwise leave code untested, and the run would still pass. `conftest.py` imports both hooks.
With pytest-xdist they see the skips of all workers, because workers report to the main process.
"""

import os
from typing import Any

import pytest

ALLOWED_REASONS = (
    "needs a CUDA device",
    "needs a machine without a GPU",
    "needs direct I/O",
    "needs shared test data: ",
    "needs the machine of the record: ",
    "engine in an environment of its own: ",
)
"""How the reason of an allowed skip begins."""


def forbidden_skips(config: pytest.Config) -> list[str]:
    """Where and why tests were skipped that must run: in CI, and in the process that reports."""
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
