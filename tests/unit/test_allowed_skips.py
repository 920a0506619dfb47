"""In CI, a skipped test without an allowed reason fails the run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from allowed_skips import ALLOWED_REASONS

pytest_plugins = ("pytester",)

SKIPPED = """
import pytest

def test_that_runs():
    pass

@pytest.mark.skipif(True, reason={reason!r})
def test_that_is_skipped():
    pass
"""
MODULE = """
import pytest

pytest.importorskip("no_such_package")
"""
TESTS = Path(__file__).parents[1]
HOOKS = (TESTS / "allowed_skips.py").read_text(encoding="utf-8")
INSTALLED_IN_CI = ("no C++ compiler on this machine", "Triton is not installed", "no Triton on this machine")
"""Reasons of skips that fail a CI run on purpose."""

WITHOUT = ("-p", "no:cacheprovider", "-p", "no:unraisableexception")
"""Options of the inner runs. The second plugin would collect the garbage of this whole process five times."""


@pytest.fixture(autouse=True)
def no_other_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the inner runs and their workers import no plugins of libraries. Options name the plugins that they need."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def outcome(pytester: pytest.Pytester, test_file: str, *options: str) -> pytest.RunResult:
    pytester.makeconftest(HOOKS)
    pytester.makepyfile(test_file)
    return pytester.runpytest_inprocess(*WITHOUT, *options)


@pytest.mark.parametrize("options", [(), ("-p", "xdist", "-n1")], ids=["alone", "xdist"])
def test_a_skip_for_another_reason_fails_the_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CI", "true")
    result = outcome(pytester, SKIPPED.format(reason="lm-eval is not installed"), *options)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*skips that CI does not allow*", "*.py:*: lm-eval is not installed"])


@pytest.mark.parametrize("options", [(), ("-p", "xdist", "-n1")], ids=["alone", "xdist"])
def test_a_skipped_file_fails_the_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CI", "true")
    result = outcome(pytester, MODULE, *options)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*skips that CI does not allow*", "*: could not import 'no_such_package'*"])


def test_a_skip_for_an_allowed_reason_passes(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    result = outcome(pytester, SKIPPED.format(reason="engine in an environment of its own: vLLM"))
    assert result.ret == pytest.ExitCode.OK
    result.stdout.no_fnmatch_line("*skips that CI does not allow*")


def test_outside_of_ci_any_skip_passes(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    result = outcome(pytester, SKIPPED.format(reason="lm-eval is not installed"))
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=1, skipped=1)


def reasons_in(path: Path) -> Iterator[str]:
    """Yield the constant beginning of each reason that a test file gives for a skip."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in ("skip", "skipif"):
            named = [word.value for word in call.keywords if word.arg == "reason"]
            reason = (named or call.args)[0]
            first = reason.values[0] if isinstance(reason, ast.JoinedStr) else reason
            yield first.value if isinstance(first, ast.Constant) else ast.unparse(reason)


def test_each_skip_has_an_allowed_reason_or_fails_ci_on_purpose() -> None:
    """So the reasons of skips that do not happen on this machine are also checked."""
    files = [path for path in TESTS.rglob("*.py") if path != Path(__file__) and "skip" in path.read_text("utf-8")]
    found = {(path.name, reason) for path in files for reason in reasons_in(path)}
    assert len(found) >= 15
    assert [each for each in sorted(found) if not each[1].startswith((*ALLOWED_REASONS, *INSTALLED_IN_CI))] == []
