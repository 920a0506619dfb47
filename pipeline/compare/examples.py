"""Prompts whose answers show where models differ, each with what every model said to it."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.compare.rows import Row
from pipeline.data.harmony import Message
from pipeline.evaluate.transcripts import Transcript

_PASSED = {True: "passed", False: "failed", None: "undecided"}


@dataclass(frozen=True)
class Answer:
    """What one model said: its channels, and what the scorers make of it (figure -> passed, failed, undecided)."""

    model: str
    transcript: Transcript
    verdicts: dict[str, str]


@dataclass(frozen=True)
class Example:
    """A prompt, and the answers of all models that were asked it.

    Attributes:
        messages: the conversation up to the answer.
        disagreements: figures on which some model passed and another failed.
        answers: in the order of the rows.
    """

    prompt_id: str
    messages: list[Message]
    disagreements: list[str]
    answers: list[Answer]


def choose(rows: list[Row], most: int) -> list[Example]:
    """Up to `most` prompts that at least two models answered: those with most disagreements first, then in order.

    Of several samples the first is shown.
    """
    answers = [answer for row in rows for answer in _answers(row)]
    prompts: dict[str, list[Answer]] = {}
    for answer in answers:
        prompts.setdefault(answer.transcript.prompt_id, []).append(answer)
    found = [_example(prompt_id, given) for prompt_id, given in prompts.items() if len(given) > 1]
    return sorted(found, key=lambda example: (-len(example.disagreements), not _differs(example)))[:most]


def _answers(row: Row) -> Iterator[Answer]:
    told: dict[str, dict[str, str]] = {}
    for figure, verdicts in row.verdicts.items():
        for each in verdicts:
            if each.sample == 0:
                told.setdefault(each.prompt_id, {})[figure] = _PASSED[each.passed]
    yield from (Answer(row.title, each, told.get(each.prompt_id, {})) for each in row.answers if each.sample == 0)


def _example(prompt_id: str, answers: list[Answer]) -> Example:
    figures = dict.fromkeys(figure for answer in answers for figure in answer.verdicts)
    opposite = {_PASSED[True], _PASSED[False]}
    disagreements = [name for name in figures if opposite <= {answer.verdicts.get(name) for answer in answers}]
    return Example(prompt_id, answers[0].transcript.messages, disagreements, answers)


def _differs(example: Example) -> bool:
    return len({(answer.transcript.reasoning, answer.transcript.answer) for answer in example.answers}) > 1
