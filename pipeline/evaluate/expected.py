"""Check the expected properties of right answers. The check runs before models are asked, and again before scoring."""

import re
from collections.abc import Callable, Iterable, Mapping

from pipeline.config.languages import NAMES, code_of
from pipeline.errors import MOST_PROBLEMS, did_you_mean, list_first, user_errors
from pipeline.evaluate.transcripts import Transcript

SAFE, UNSAFE = "safe", "unsafe"
CHOICE = re.compile(r"[A-E]")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
"""A plain number; commas may separate thousands."""


def check(expected: Iterable[tuple[str, Mapping[str, str]]]) -> None:
    """Check the expected properties of all prompts, given as (prompt_id, properties).

    Properties that KEYS does not list are ignored.

    Raises:
        UserError: scorers cannot use some values. For each such value, the message names the first prompt and counts
            the other prompts.
    """
    prompts: dict[tuple[str, str], list[str]] = {}
    for prompt_id, values in expected:
        for key in KEYS.keys() & values.keys():
            if KEYS[key](values[key]) is not None:
                prompts.setdefault((key, values[key]), []).append(prompt_id)
    found = [
        f"expected {key} {value!r} of prompt {list_first(ids, most=1)}: {KEYS[key](value)}"
        for (key, value), ids in sorted(prompts.items())
    ]
    if found:
        raise user_errors(found, most=MOST_PROBLEMS)


def check_all(transcripts: Iterable[Transcript]) -> None:
    """Check the expected properties of transcripts; see `check`."""
    check((each.prompt_id, each.expected) for each in transcripts)


def _language_problem(value: str) -> str | None:
    if code_of(value) is not None:
        return None
    known = ", ".join(f"{name} ({code})" for name, code in NAMES.items())
    return f"not a supported language.{did_you_mean(value.strip().capitalize(), NAMES)} Supported are {known}."


def _answer_problem(value: str) -> str | None:
    is_readable = CHOICE.fullmatch(value.strip()) or NUMBER.fullmatch(value.strip())
    return None if is_readable else "neither a plain number (70000, 2,125, -0.5) nor a choice from A to E."


def _safety_problem(value: str) -> str | None:
    return None if value in (SAFE, UNSAFE) else f"must be {SAFE} or {UNSAFE}."


KEYS: dict[str, Callable[[str], str | None]] = {
    "language": _language_problem,
    "answer_language": _language_problem,
    "answer": _answer_problem,
    "safety": _safety_problem,
}
"""Expected property -> function that says what is wrong with a value, or returns None if the value is valid.

The property `category` is not listed, because it may have any value.
"""
