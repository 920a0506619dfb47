r"""Whether what a model writes is sound, whatever it says: channels, the end, loops.

Fine-tuning and rounding break these before they break knowledge. A completion, as generated after
`<|start|>assistant`, is a row of Harmony messages: an optional recipient, `<|channel|>`, a channel's name, perhaps a
recipient and a type, `<|message|>`, text, and what ends it.

No text of MGSM's questions (1,750, seven languages) or of XSTest's completions (450) is a loop by the limits below; the
largest share of repeated letters in them is 0.39. Long tables whose rows are alike are taken for loops.
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

_ENDS = ("return", "stop", "call", "tool_calls")  # ours, and an endpoint's
_LENGTH = "length"
_LOOP_LETTERS = 200  # of one phrase over and over, and
_LOOP_ROUNDS = 4  # at least so often
_NGRAM = 16  # letters
_MOST_REPEATED = 0.5
_SPACES = re.compile(r"\s+")


def score(subject: Subject) -> dict[str, float]:
    """Shares of transcripts: `format_health` passes all that can be told, `format_health/<check>` one of CHECKS."""
    found = figures("format_health", verdicts(subject.transcripts))
    for name, check in CHECKS.items():
        told = [told for told in map(check, subject.transcripts) if told is not None]
        if told:
            found[f"format_health/{name}"] = sum(told) / len(told)
    return found


def verdicts(transcripts: Sequence[Transcript]) -> list[Verdict]:
    """Whether each transcript passes all checks that can be made of it; never undecided."""
    return [
        Verdict(each.prompt_id, each.sample, "", all(check(each) is not False for check in CHECKS.values()))
        for each in transcripts
    ]


def ended(transcript: Transcript) -> bool:
    """It stopped by itself."""
    return transcript.finish in _ENDS


def not_cut(transcript: Transcript) -> bool:
    """It was not cut by the limit of tokens."""
    return transcript.finish != _LENGTH


def well_formed(transcript: Transcript) -> bool | None:
    """Its channels are as Harmony has them. None where it was cut, or an endpoint hides the special tokens."""
    if transcript.completion is None or transcript.finish == _LENGTH:
        return None
    return _WHOLE.fullmatch(transcript.completion) is not None


def answered(transcript: Transcript) -> bool | None:
    """It has an answer that is not empty. None for a tool call, which needs none."""
    if transcript.finish in ("call", "tool_calls"):
        return None
    return bool(transcript.answer and transcript.answer.strip())


def not_leaking(transcript: Transcript) -> bool | None:
    """No control token or channel name is in the answer, and it is not the reasoning again. None without an answer."""
    if not transcript.answer:
        return None
    same = transcript.reasoning is not None and _plain(transcript.reasoning) == _plain(transcript.answer)
    return not same and _LEAK.search(transcript.answer) is None


def not_looping(transcript: Transcript) -> bool:
    """Neither reasoning nor answer goes round in circles."""
    return not any(loops(text) for text in (transcript.reasoning, transcript.answer) if text)


CHECKS: dict[str, Callable[[Transcript], bool | None]] = {
    "ended": ended,
    "not_cut": not_cut,
    "well_formed": well_formed,
    "answered": answered,
    "not_leaking": not_leaking,
    "not_looping": not_looping,
}
"""Figure -> what has to be true; None where it cannot be told."""


def loops(text: str) -> bool:
    """Whether the text ends in a phrase that is repeated, or more than half of it are repeated runs of letters.

    The first finds loops that go on to the end word by word, the second those that count up or change a word. Runs are
    of letters, not words, so that languages without spaces are treated alike.
    """
    plain = _plain(text)
    return _periodic_end(plain) or _repeated_share(plain) > _MOST_REPEATED


def _periodic_end(text: str) -> bool:
    """Whether the end repeats with some period, long and often enough; lines of one sign alone do not count."""
    end = text[-20 * _LOOP_LETTERS :][::-1]
    # The border of a prefix of the reversed text gives its period (Knuth, Morris and Pratt 1977).
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
    """Share of runs of letters that occurred before; 0 for short texts."""
    letters = "".join(filter(str.isalpha, text))
    count = len(letters) - _NGRAM + 1
    if count < _LOOP_LETTERS:
        return 0.0
    return 1 - len({letters[i : i + _NGRAM] for i in range(count)}) / count


def _plain(text: str) -> str:
    return _SPACES.sub(" ", text).strip()
