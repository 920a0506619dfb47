"""Check whether a model's reasoning and its answer are in the expected language.

`data.languages` identifies the language offline. It knows only the languages in `config.languages.NAMES`. A text in two
languages fails if neither makes up two thirds of the text. A text is undecided if it is missing or too short, or if the
classifier's confidence is low.
"""

from collections.abc import Callable, Sequence
from functools import cache

from pipeline.config.languages import NAMES, code_of
from pipeline.data.languages import UNDECIDED, Languages
from pipeline.evaluate.expected import check_all
from pipeline.evaluate.subject import Subject
from pipeline.evaluate.transcripts import Transcript
from pipeline.evaluate.verdicts import Verdict, figures


def score_reasoning(subject: Subject) -> dict[str, float]:
    """Compute `reasoning_language`, the share of reasoning texts in expected["language"], in total and by language."""
    return figures("reasoning_language", reasoning_verdicts(subject.transcripts))


def score_answer(subject: Subject) -> dict[str, float]:
    """Compute `answer_language`, the share of answers in the expected language, in total and by language."""
    return figures("answer_language", answer_verdicts(subject.transcripts))


def reasoning_verdicts(transcripts: Sequence[Transcript]) -> list[Verdict]:
    """Return verdicts on the transcripts with expected["language"], a name or an ISO 639-1 code.

    The group of a verdict is the language's code.

    Raises:
        UserError: an expected value is invalid (see `expected.check`).
    """
    return _verdicts(transcripts, lambda each: each.expected.get("language"), lambda each: each.reasoning)


def answer_verdicts(transcripts: Sequence[Transcript]) -> list[Verdict]:
    """Return verdicts on the answers. The rules are the same as in `reasoning_verdicts`, with one exception.

    expected["answer_language"] takes precedence over expected["language"].
    """
    return _verdicts(
        transcripts,
        lambda each: each.expected.get("answer_language", each.expected.get("language")),
        lambda each: each.answer,
    )


def _verdicts(
    transcripts: Sequence[Transcript],
    wanted_of: Callable[[Transcript], str | None],
    text_of: Callable[[Transcript], str | None],
) -> list[Verdict]:
    wanted = [(each, language) for each in transcripts if (language := wanted_of(each)) is not None]
    check_all(each for each, _ in wanted)
    return [_verdict(each, str(code_of(language)), text_of(each) or "") for each, language in wanted]


def _verdict(transcript: Transcript, code: str, text: str) -> Verdict:
    found = _languages().of(text)
    return Verdict(transcript.prompt_id, transcript.sample, code, None if found == UNDECIDED else found == code)


@cache
def _languages() -> Languages:
    return Languages(list(NAMES.values()), "config.languages.NAMES")
