"""Mistakes of the user: one clear message each, no traceback, exit status 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend: says what is wrong, with its value and place, and what to do."""

    exit_status = 2

    def __init__(self, message: str, problems: list[str] | None = None) -> None:
        """`problems`: those that `message` reports together; None: it is one."""
        super().__init__(message)
        self.problems = problems or [message]


class CheckFailed(Exception):
    """A check of the program found a wrong result (not a mistake of the user): exit status 1, no traceback."""

    exit_status = 1


def user_errors(problems: list[str]) -> UserError:
    """One error that reports several problems together."""
    if len(problems) == 1:
        return UserError(problems[0])
    return UserError(f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems), problems)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean …?' for a misspelt word, or the empty string."""
    known = list(known)
    by_leaf = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.6) or by_leaf[:2]
    return f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
