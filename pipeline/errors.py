"""Errors that end a command with one clear message, without a traceback.

A mistake of the user exits with 2. A failed check, or a machine that cannot do the work, exits with 1.
"""

import difflib
from collections.abc import Iterable

MOST_PROBLEMS = 8
"""Number of problems that a long list shows. The rest are counted."""


class UserError(Exception):
    """A mistake that the user can correct. The message names the place, the wrong value and what to do.

    Attributes:
        problems: one line for each problem in the message. A long list ends with "and N more".
        count: number of problems, including the problems that are not shown.
    """

    exit_status = 2

    def __init__(self, message: str, problems: list[str] | None = None, count: int | None = None) -> None:
        """Create the error. If `problems` is None, the message is the only problem."""
        super().__init__(message)
        self.problems = problems or [message]
        self.count = count or len(self.problems)


class CheckFailed(Exception):
    """A check found a wrong result, which is not a mistake of the user. The exit status is 1."""

    exit_status = 1


class MachineError(Exception):
    """The machine cannot do the work, for example because its memory is too small. The exit status is 1."""

    exit_status = 1


def prefixed(error: UserError | CheckFailed | MachineError, prefix: str) -> Exception:
    """Return an error of the same kind, whose message begins with a prefix."""
    message = f"{prefix}: {error}"
    return UserError(message, count=error.count) if isinstance(error, UserError) else type(error)(message)


class Problems:
    """Counts all problems of a stream, but keeps only the first few. There may be too many to store."""

    def __init__(self, most: int = MOST_PROBLEMS) -> None:
        self._most = most
        self._first: list[str] = []
        self._count = 0

    def add(self, problem: str) -> None:
        """Count a problem, and keep it unless the list is full."""
        self._count += 1
        if len(self._first) < self._most:
            self._first.append(problem)

    def lines(self) -> list[str]:
        """List the first problems, and count the rest in a last line."""
        return _with_rest(self._first, self._count)

    def raise_if_any(self) -> None:
        """Raise one UserError that reports all problems together."""
        if self._count:
            raise _together(self.lines(), self._count)


def at_most(problems: list[str], most: int = MOST_PROBLEMS) -> list[str]:
    """List the first problems, and count the rest in a last line."""
    return _with_rest(problems[:most], len(problems))


def user_errors(problems: list[str], most: int | None = None) -> UserError:
    """Combine several problems into one error. The error shows all problems, or the first `most`."""
    return _together(problems if most is None else at_most(problems, most), len(problems))


def joined(errors: list[UserError]) -> UserError:
    """Combine several errors into one. Errors with the same message are reported once."""
    distinct = list({str(error): error for error in errors}.values())
    if len(distinct) == 1:
        return distinct[0]
    return _together([line for error in distinct for line in error.problems], sum(error.count for error in distinct))


def _with_rest(first: list[str], count: int) -> list[str]:
    rest = count - len(first)
    return [*first, f"and {rest} more"] if rest else first


def _together(lines: list[str], count: int) -> UserError:
    if count == 1:
        return UserError(lines[0])
    return UserError(f"{count} problems:\n" + "\n".join(f"  - {line}" for line in lines), lines, count)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean …?" if known words are similar, else the empty string."""
    known = list(known)
    by_leaf = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.6) or by_leaf[:2]
    return f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
