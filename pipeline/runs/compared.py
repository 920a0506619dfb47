"""The directories of the runs that `compare.runs` lists."""

import fnmatch
import glob
from pathlib import Path

from pipeline.config import Stage
from pipeline.runs import own_settings
from pipeline.runs.artifacts import ARTIFACT_FILE, UNFINISHED_FILE
from pipeline.runs.commands import advise, run_command
from pipeline.runs.paths import absolute

EVALUATE = Stage.evaluate.name


def find_directories(patterns: list[str], own: Path | None = None) -> tuple[list[Path], list[str]]:
    """Find the runs, and check that they were evaluated.

    Args:
        patterns: entries of compare.runs. Each is a run directory, its evaluate directory, or a pattern that matches
            such directories.
        own: directory of the run that this command evaluates before it compares, so it need not be there yet.

    Returns:
        The directories of the runs, each once, and a message for each mistake.
    """
    problems: list[str] = []
    named: dict[Path, str] = {}
    for pattern in patterns:
        directories = _match(pattern)
        if not directories and not _will_match(pattern, own):
            problems.append(
                f"compare.runs: {pattern!r}: no directory matches. Give run directories, or patterns like runs/*."
            )
        for directory in directories:
            if directory in named:
                by = f"by {named[directory]!r} and by {pattern!r}" if named[directory] != pattern else f"as {pattern!r}"
                problems.append(f"compare.runs: {directory} is named twice: {by}. Leave one out.")
            elif not _is_same(directory, own) and (problem := _problem(directory)) is not None:
                problems.append(f"compare.runs: {problem}")
            named.setdefault(directory, pattern)
    return list(named), problems


def evaluate_command(directory: Path) -> str:
    """Return the command that evaluates a run. It is complete if the run has recorded its settings."""
    command = run_command(Stage.evaluate, str(directory))
    return command if own_settings.read(directory) is not None else f"{command}, with the run's recipe"


def _match(pattern: str) -> list[Path]:
    path = absolute(pattern)
    matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path)))]
    return [match.parent if match.name == EVALUATE else match for match in map(Path.resolve, matches)]


def _will_match(pattern: str, own: Path | None) -> bool:
    path = str(absolute(pattern))
    return own is not None and any(fnmatch.fnmatch(str(absolute(each)), path) for each in (own, own / EVALUATE))


def _is_same(directory: Path, own: Path | None) -> bool:
    return own is not None and directory == own.resolve()


def _problem(directory: Path) -> str | None:
    """Return the reason why a directory is not an evaluated run, with advice; None for an evaluated run."""
    evaluate = directory / EVALUATE
    if (evaluate / ARTIFACT_FILE).is_file():
        return None
    if (evaluate / UNFINISHED_FILE).is_file():
        return f"{evaluate}: the evaluation is unfinished. Run it again: {evaluate_command(directory)}"
    if directory.is_dir() and any((directory / stage.name / ARTIFACT_FILE).is_file() for stage in Stage):
        return f"{directory}: the run was not evaluated. {advise(evaluate_command(directory))}"
    return f"{directory}: not the directory of a run, because no stage in it is complete. Give a run_dir."
