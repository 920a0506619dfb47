"""Choose prompts on which models differ, and collect the answers of all models to these prompts."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.compare.rows import Row
from pipeline.data.conversations import Message
from pipeline.evaluate.transcripts import Transcript

_OUTCOMES = {True: "passed", False: "failed", None: "undecided"}


@dataclass(frozen=True)
class Answer:
    """The answer of one model.

    Attributes:
        model: title of the model's row.
        transcript: the answer, by channel.
        verdicts: verdict for each figure: passed, failed or undecided.
    """

    model: str
    transcript: Transcript
    verdicts: dict[str, str]


@dataclass(frozen=True)
class Example:
    """A prompt, and the answers of all models that answered it.

    Attributes:
        prompt_id: id of the prompt.
        messages: the conversation up to the answer.
        disagreements: figures on which at least one model passed and at least one failed.
        answers: one answer of each model that answered the prompt, in the order of the rows.
        reference: the answer in the data, or the expected answer of the scorers, or None if there is neither.
    """

    prompt_id: str
    messages: list[Message]
    disagreements: list[str]
    answers: list[Answer]
    reference: str | None


def choose(rows: list[Row], most: int) -> list[Example]:
    """Choose up to `most` prompts that at least two models answered. Prompts with more disagreements come first.

    An example shows only the first sample of each model's answers.
    """
    answers = [answer for row in rows for answer in _first_answers(row)]
    prompts: dict[str, list[Answer]] = {}
    for answer in answers:
        prompts.setdefault(answer.transcript.prompt_id, []).append(answer)
    found = [_make_example(prompt_id, given) for prompt_id, given in prompts.items() if len(given) > 1]
    return sorted(found, key=lambda example: (-len(example.disagreements), not _has_different_answers(example)))[:most]


def _first_answers(row: Row) -> Iterator[Answer]:
    outcomes: dict[str, dict[str, str]] = {}
    for figure, verdicts in row.verdicts.items():
        for each in verdicts:
            if each.sample == 0:
                outcomes.setdefault(each.prompt_id, {})[figure] = _OUTCOMES[each.passed]
    yield from (Answer(row.title, each, outcomes.get(each.prompt_id, {})) for each in row.answers if each.sample == 0)


def _make_example(prompt_id: str, answers: list[Answer]) -> Example:
    figures = dict.fromkeys(figure for answer in answers for figure in answer.verdicts)
    opposite = {_OUTCOMES[True], _OUTCOMES[False]}
    disagreements = [name for name in figures if opposite <= {answer.verdicts.get(name) for answer in answers}]
    first = answers[0].transcript
    reference = first.reference if first.reference is not None else first.expected.get("answer")
    return Example(prompt_id, first.messages, disagreements, answers, reference)


def _has_different_answers(example: Example) -> bool:
    return len({(answer.transcript.reasoning, answer.transcript.answer) for answer in example.answers}) > 1
