"""Report the stages that are up to date. `stage=all` reports neighbouring ones together, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.runs.console import say
from pipeline.runs.paths import absolute


@dataclass
class _Summary:
    """The state of a summary.

    Attributes:
        name: stage that the line is printed for.
        run_dir: directory of the run.
        pending: stages that the next line names.
        finished: all stages that were up to date.
        held: lines that are printed only if the present stage has work to do.
    """

    name: str
    run_dir: str
    pending: list[str] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)
    held: list[tuple[str, str]] = field(default_factory=list)


_summary: _Summary | None = None
_is_reported = False
"""Whether the last stage that has begun was up to date."""


@contextmanager
def summarize(name: str, run_dir: str) -> Iterator[None]:
    """In this block, report neighbouring stages that are up to date in one line."""
    global _summary
    _summary = _Summary(name, run_dir)
    try:
        yield
    finally:
        flush()
        _summary = None


def begin() -> None:
    """Declare that a stage begins."""
    global _is_reported
    _is_reported = False


def is_reported() -> bool:
    """Return whether the last stage that has begun was up to date."""
    return _is_reported


def report(stage: str, directory: Path) -> None:
    """Report that a stage is up to date."""
    global _is_reported
    _is_reported = True
    if _summary is None:
        say(stage, f"up to date: {directory}")
        return
    run_dir = absolute(_summary.run_dir)
    # A stage of a control is named with its directory, as in controls/more_sft/sft. Parts of a stage are not named.
    directory = directory.parent if directory.parent.name == stage else directory
    name = directory.relative_to(run_dir).as_posix() if directory.is_relative_to(run_dir) else stage
    _summary.held.clear()
    _summary.pending.append(name)
    _summary.finished.add(name)


def is_summarized(stage: str) -> bool:
    """Return whether a summary has reported this stage. Then the stage prints only warnings and where its report is."""
    return _summary is not None and stage in _summary.finished


def say_if_needed(stage: str, message: str) -> None:
    """Print a line about the stage's input. A summary prints it only if the stage has work to do."""
    if _summary is None:
        say(stage, message)
    else:
        _summary.held.append((stage, message))


def flush() -> None:
    """Print the line of the summary, if there is one. Call this before a stage begins to work."""
    if _summary is None:
        return
    if _summary.pending:
        say(_summary.name, f"up to date: {', '.join(_summary.pending)} ({_summary.run_dir})")
    for stage, message in _summary.held:
        say(stage, message)
    _summary.pending.clear()
    _summary.held.clear()
