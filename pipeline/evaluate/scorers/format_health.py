r"""Check the form of an answer: its channels, its end, and loops. The content does not matter.

Fine-tuning and rounding damage the form before they damage knowledge. A completion follows `<|start|>assistant` and is
a sequence of Harmony messages. Each message has these parts in order: an optional recipient, `<|channel|>`, the
channel's name, an optional recipient, an optional type, `<|message|>`, text, and an end token.

The limits below were tested on 1,750 MGSM questions in seven languages and on 450 XSTest completions. None of these
texts counts as a loop. In the most repetitive text, 39 % of the runs of letters are repetitions, and the limit is 50 %.
Long tables with similar rows are mistaken for loops.
"""

import re
from collections.abc import Callable, Sequence

from pipeline.evaluate.subject import Subject
from pipeline.evaluate.transcripts import Transcript
from pipeline.evaluate.verdicts import Verdict, figures

_TEXT = r"(?:(?!<\|\w+\|>).)*"
_HEADER = (
    r"(?: to=[^\s<]+)?<\|channel\|>(?:analysis|commentary|final)(?: to=[^\s<]+)?"
    r"(?: ?<\|constrain\|>[a-z]+| [a-z]+)?<\|message\|>"
)
_WHOLE = re.compile(
    rf"(?:{_HEADER}{_TEXT}<\|end\|><\|start\|>assistant)*{_HEADER}{_TEXT}(?:<\|return\|>|<\|call\|>)", re.DOTALL
)
_LEAK = re.compile(r"<\|\w+\|>|\A\W*(?:assistant)?(?:analysis|commentary|final)(?=[A-Z])|assistant(?:final|analysis)")

_ENDS = ("return", "stop", "call", "tool_calls")  # values of `finish` from this program and from endpoints
_LENGTH = "length"
_LOOP_LETTERS = 200  # shortest loop, in letters
_LOOP_ROUNDS = 4  # fewest repetitions in a loop
_NGRAM = 16  # letters in a run
_MOST_REPEATED = 0.5  # a text with a larger share of repeated runs is a loop
_SPACES = re.compile(r"\s+")


def score(subject: Subject) -> dict[str, float]:
    """Compute `format_health`, the share of transcripts that pass all checks.

    Also compute `format_health/<check>`, the share of transcripts that pass this check.
    """
    found = figures("format_health", verdicts(subject.transcripts))
    for name, check in CHECKS.items():
        decided = [passed for passed in map(check, subject.transcripts) if passed is not None]
        if decided:
            found[f"format_health/{name}"] = sum(decided) / len(decided)
    return found


def verdicts(transcripts: Sequence[Transcript]) -> list[Verdict]:
    """Return a verdict for each transcript: it passes unless a check fails. Undecided checks are ignored."""
    return [
        Verdict(each.prompt_id, each.sample, "", all(check(each) is not False for check in CHECKS.values()))
        for each in transcripts
    ]


def has_ended(transcript: Transcript) -> bool:
    """Return whether the model itself ended the generation."""
    return transcript.finish in _ENDS


def is_not_truncated(transcript: Transcript) -> bool:
    """Return whether generation ended before the limit of tokens."""
    return transcript.finish != _LENGTH


def is_well_formed(transcript: Transcript) -> bool | None:
    """Return whether the channels follow Harmony.

    Return None if the transcript is truncated, or if an endpoint hides the special tokens.
    """
    if transcript.completion is None or transcript.finish == _LENGTH:
        return None
    return _WHOLE.fullmatch(transcript.completion) is not None


def has_answer(transcript: Transcript) -> bool | None:
    """Return whether the answer has text, or None for a tool call, which needs no answer."""
    if transcript.finish in ("call", "tool_calls"):
        return None
    return bool(transcript.answer and transcript.answer.strip())


def does_not_leak(transcript: Transcript) -> bool | None:
    """Return whether the answer is free of control tokens and channel names, and differs from the reasoning.

    Return None if there is no answer.
    """
    if not transcript.answer:
        return None
    same = transcript.reasoning is not None and _normalize(transcript.reasoning) == _normalize(transcript.answer)
    return not same and _LEAK.search(transcript.answer) is None


def does_not_loop(transcript: Transcript) -> bool:
    """Return False if the reasoning or the answer is a loop."""
    return not any(is_loop(text) for text in (transcript.reasoning, transcript.answer) if text)


CHECKS: dict[str, Callable[[Transcript], bool | None]] = {
    "ended": has_ended,
    "not_cut": is_not_truncated,
    "well_formed": is_well_formed,
    "answered": has_answer,
    "not_leaking": does_not_leak,
    "not_looping": does_not_loop,
}
"""Name of a check -> function that returns whether the transcript passes, or None if undecided."""


def is_loop(text: str) -> bool:
    """Return whether at least one of two tests finds a loop.

    The first test finds texts that repeat a phrase word for word up to the end. The second test finds loops in which a
    number or a word changes: more than half of the runs of letters are repetitions. Runs consist of letters, not words,
    so that the test also works in languages without spaces.
    """
    plain = _normalize(text)
    return _ends_periodically(plain) or _repeated_share(plain) > _MOST_REPEATED


def _ends_periodically(text: str) -> bool:
    """Return whether the text ends in a loop. Repeated dashes or other signs are not a loop."""
    end = text[-20 * _LOOP_LETTERS :][::-1]
    # This is the failure function of Knuth, Morris and Pratt (1977). Let t be end[: i + 1]. border[i] is the length of
    # the longest proper prefix of t that is also a suffix of t. So t repeats with the period i + 1 - border[i].
    border = [0] * len(end)
    for i in range(1, len(end)):
        k = border[i - 1]
        while k and end[i] != end[k]:
            k = border[k - 1]
        border[i] = k + (end[i] == end[k])
        length, period = i + 1, i + 1 - border[i]
        if length >= max(_LOOP_LETTERS, _LOOP_ROUNDS * period) and any(map(str.isalnum, end[:period])):
            return True
    return False


def _repeated_share(text: str) -> float:
    """Compute the share of runs that occurred before. A run is _NGRAM letters long. Return 0 for short texts."""
    letters = "".join(filter(str.isalpha, text))
    count = len(letters) - _NGRAM + 1
    if count < _LOOP_LETTERS:
        return 0.0
    return 1 - len({letters[i : i + _NGRAM] for i in range(count)}) / count


def _normalize(text: str) -> str:
    return _SPACES.sub(" ", text).strip()
