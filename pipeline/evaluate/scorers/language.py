"""Whether a model reasons, and answers, in the language that it was asked to.

`data.languages` tells the language offline, among those in its table. A text of two languages, neither with two thirds
of it, is in none. A text is undecided if it is missing, too short, or if the classifier is not sure of it.
"""

from collections.abc import Callable, Sequence
from functools import cache

from pipeline.config.languages import NAMES, code_of
from pipeline.data.languages import UNDECIDED, Languages
from pipeline.evaluate.expected import check_all
from pipeline.evaluate.subject import Subject
from pipeline.evaluate.transcripts import Transcript
from pipeline.evaluate.verdicts import Verdict, figures


def reasoning(subject: Subject) -> dict[str, float]:
    """Shares of transcripts whose analysis is in expected["language"]: `reasoning_language`, and for each language."""
    return figures("reasoning_language", reasoning_verdicts(subject.transcripts))


def answer(subject: Subject) -> dict[str, float]:
    """Shares of transcripts whose answer is in the language of the question: `answer_language`, as `reasoning`."""
    return figures("answer_language", answer_verdicts(subject.transcripts))


def reasoning_verdicts(transcripts: Sequence[Transcript]) -> list[Verdict]:
    """On the transcripts with expected["language"], a name or an ISO 639-1 code; the group is the code.

    Raises:
        UserError: what is expected cannot be used (see `expected.check`).
    """
    return _verdicts(transcripts, lambda each: each.expected.get("language"), lambda each: each.reasoning)


def answer_verdicts(transcripts: Sequence[Transcript]) -> list[Verdict]:
    """As `reasoning_verdicts`, of the answer; expected["answer_language"] wins where there is one."""
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
    told = _languages().of(text)
    return Verdict(transcript.prompt_id, transcript.sample, code, None if told == UNDECIDED else told == code)


@cache
def _languages() -> Languages:
    return Languages(list(NAMES.values()), "config.languages.NAMES")
