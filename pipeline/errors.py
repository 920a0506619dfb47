"""Errors that end a command with one clear message, without a traceback.

A mistake of the user exits with 2. A failed check, or a machine that cannot do the work, exits with 1.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

MOST_PROBLEMS = 8
"""Number of problems that a long list shows. The rest are counted."""

_SHOWN = 3
"""Number of names that a list within a message shows. The rest are counted."""

_NUMBER = re.compile(r"\d+")
_Result = TypeVar("_Result")
_PLURALS = {"has": " have", "begins": " begin", "is": ": each is"}


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


def add_prefix(error: UserError | CheckFailed | MachineError, prefix: str) -> Exception:
    """Return an error of the same kind, whose message begins with a prefix."""
    message = f"{prefix}: {error}"
    return UserError(message, count=error.count) if isinstance(error, UserError) else type(error)(message)


class RowProblems:
    """Collects the problems of rows, and groups equal ones. Each group has a count and its first rows.

    There may be more bad rows than memory can hold, so only the first groups are kept. All other rows are one group.
    Numbers in a reason, such as the index of a message, do not make another group.
    """

    def __init__(self, most: int = MOST_PROBLEMS) -> None:
        self._most = most
        self._groups: dict[str, _Group] = {}
        self._others: _Group | None = None

    def add(self, where: str, reason: str) -> None:
        """Add the problem of a row.

        Args:
            where: place of the row, as in `chats.jsonl: row 3`.
            reason: what is wrong with the row, without a full stop. The text continues a sentence about the row
                ("has no 'messages'"), or is a sentence of its own.
        """
        key = _NUMBER.sub("…", reason)
        if key in self._groups:
            self._groups[key].add(where, reason)
        elif len(self._groups) < self._most:
            self._groups[key] = _Group(reason, [where])
        elif self._others is None:
            self._others = _Group(reason, [where], kind="other")
        else:
            self._others.add(where, reason)

    def raise_if_any(self) -> None:
        """Raise one UserError that reports all groups together, one line for each."""
        groups = [*self._groups.values(), *([] if self._others is None else [self._others])]
        lines = [str(group) for group in groups]
        if lines:
            raise _together(lines, len(lines))


@dataclass
class _Group:
    """Rows with the same problem, or with problems of one kind. `reason` is the problem of the first row.

    `places` has the first few rows, and `count` is the number of all.
    """

    reason: str
    places: list[str]
    count: int = 1
    is_one_file: bool = True
    has_one_reason: bool = True
    kind: str = "similar"

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        self.is_one_file = self.is_one_file and _split_place(where)[0] == _split_place(self.places[0])[0]
        self.has_one_reason = self.has_one_reason and reason == self.reason
        if len(self.places) < _SHOWN:
            self.places.append(where)

    def __str__(self) -> str:
        if self.count == 1:
            return f"{self.places[0]}: {self.reason}."
        file, _ = _split_place(self.places[0])
        places = [_split_place(where)[1] for where in self.places] if self.is_one_file else self.places
        is_complete = self.count == len(places)
        shown = f"{', '.join(places[:-1])} and {places[-1]}" if is_complete else list_first(places, total=self.count)
        rows = f"{f'{file}: ' if self.is_one_file and file else ''}{self.count} rows ({shown})"
        if not self.has_one_reason:
            return f"{rows} have {self.kind} problems. The first: {self.reason}."
        verb, _, others = self.reason.partition(" ")
        return f"{rows}{_PLURALS[verb]} {others}." if verb in _PLURALS else f"{rows}: {self.reason}."


def _split_place(where: str) -> tuple[str, str]:
    """Split `chats.jsonl: row 3` into the file and the number. The file is empty if `where` has another form."""
    file, _, number = where.rpartition(": row ")
    return file, number


def at_most(problems: list[str], most: int = MOST_PROBLEMS) -> list[str]:
    """List the first problems, and count the rest in a last line."""
    rest = len(problems) - most
    return [*problems[:most], _more(rest)] if rest > 0 else problems


def list_first(names: Sequence[str], most: int = _SHOWN, total: int | None = None) -> str:
    """List the first names, and count the rest: `a, b, c and 2 more`.

    Args:
        names: all names, or at least the first `most`.
        most: number of names that are listed.
        total: number of all names, if `names` has only some of them.
    """
    shown = ", ".join(names[:most])
    rest = (len(names) if total is None else total) - len(names[:most])
    return f"{shown} {_more(rest)}" if rest > 0 else shown


def _more(count: int) -> str:
    return f"and {count} more"


def user_errors(problems: list[str], most: int | None = None) -> UserError:
    """Combine several problems into one error. The error shows all problems, or the first `most`."""
    return _together(problems if most is None else at_most(problems, most), len(problems))


def join_errors(errors: list[UserError]) -> UserError:
    """Combine several errors into one. Errors with the same message are reported once."""
    distinct = list({str(error): error for error in errors}.values())
    if len(distinct) == 1:
        return distinct[0]
    return _together([line for error in distinct for line in error.problems], sum(error.count for error in distinct))


class Attempts:
    """Makes several attempts, and reports the mistakes of all of them together."""

    def __init__(self) -> None:
        self._errors: list[UserError] = []

    def attempt(self, act: Callable[[], _Result]) -> _Result | None:
        """Return the result of `act`. If it raises UserError, keep the error and return None."""
        try:
            return act()
        except UserError as error:
            self._errors.append(error)
            return None

    @property
    def problems(self) -> list[str]:
        """One line for each problem so far."""
        return list(dict.fromkeys(line for error in self._errors for line in error.problems))

    def raise_if_any(self) -> None:
        """Raise the errors as one UserError, if there are any."""
        if self._errors:
            raise join_errors(self._errors)


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
