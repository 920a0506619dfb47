"""Check whether a free-text answer has the expected number or choice.

This module searches three places for a number, in this order:
- the last \\boxed{}
- the text after the last "the answer is", in any of nine languages
- the whole answer. Its last number is taken.

Numbers may have thousands separators and decimal commas: "1.234,5" in German is "1,234.5" in English. Models also use
the English notation in other languages. So in a language with decimal commas, both notations are tried. For example,
"70,000" in a German answer is right for 70 and for 70000. Fractions, numbers in words and multiples of ten thousand
(3万) are not read.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from decimal import Decimal

from pipeline.config.languages import code_of
from pipeline.evaluate.expected import CHOICE, check_all
from pipeline.evaluate.subject import Subject
from pipeline.evaluate.transcripts import Transcript
from pipeline.evaluate.verdicts import Verdict, figures

_DECIMAL_POINT = frozenset(("en", "zh", "ja", "ko", "th", "he", "hi", "bn", "te", "ta", "sw"))
"""Codes of languages that write 1,234.5. All other languages of config.languages.NAMES write 1.234,5."""

_NUMBERS = re.compile(
    r"(?<![\w.,])[-−–]?\d(?:[\d.,'’]*\d|(?: \d{3})+(?!\d))*"
    r"|(?<=[^\W\d_])\d(?:[\d.,]*\d)?"  # or directly after a letter, because Chinese has no spaces
)
_SPACING = re.compile(r"['’\s]")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_ANSWER_IS = re.compile(
    r"\banswer(?: is|:)|\bantwort(?: ist| lautet|:)|\bréponse(?: est| ?:)|\brespuesta(?: es|:)|\brisposta(?: è|:)"
    r"|\bresposta(?: é|:)|\bответ\b|答案(?:是|为|為|：|:)|答え(?:は|：|:)",
    re.IGNORECASE,
)
_LATIN = "A-Za-zÀ-ɏ0-9'’"  # a letter from A to E is part of a word if one of these characters is next to it
_ALONE = re.compile(rf"\(([A-E])\)|(?<![{_LATIN}])([A-E])(?![{_LATIN}])")
_LEADING = re.compile(r"\W*([A-E])(?:\W*$|\s*[).:\]]|\*\*)", re.MULTILINE)
_TRAILING = re.compile(rf"(?<![{_LATIN}])([A-E])\W*$")


def score(subject: Subject) -> dict[str, float]:
    """Compute the rate `exact_match`, in total and for each language."""
    return figures("exact_match", verdicts(subject.transcripts))


def verdicts(transcripts: Sequence[Transcript]) -> list[Verdict]:
    """Judge the transcripts that have expected["answer"], a number or a choice.

    The group of a verdict is the answer's language.

    A missing answer is wrong, and so is an answer without a number or choice.

    Raises:
        UserError: an expected value is invalid (see `expected.check`).
    """
    wanted = [each for each in transcripts if "answer" in each.expected]
    check_all(wanted)
    return [_verdict(each) for each in wanted]


def is_right(answer: str, expected: str, language: str = "en") -> bool:
    """Check whether an answer contains the expected number or choice.

    Args:
        answer: the model's answer.
        expected: a number such as "70000", "2,125" or "-0.5", or a letter from A to E.
        language: ISO 639-1 code of the answer's language.
    """
    wanted = expected.strip()
    if CHOICE.fullmatch(wanted):
        return _choice(answer) == wanted
    value = Decimal(wanted.replace(",", ""))
    found = _number(answer)
    return found is not None and value in readings(found, language)


def readings(number: str, language: str) -> list[Decimal]:
    """Return the possible values of a number: first in the language's notation, then in English notation if it differs.

    The list is empty for a number that fits no notation, such as 1.2.3.
    """
    compact = _SPACING.sub("", number).translate({ord("−"): "-", ord("–"): "-"})
    notations = [(",", ".")] if language in _DECIMAL_POINT else [(".", ","), (",", ".")]
    return [value for notation in notations for value in _read(compact, *notation)]


def _read(compact: str, thousands: str, point: str) -> Iterator[Decimal]:
    whole, _, fraction = compact.partition(point)
    groups = whole.lstrip("-").split(thousands)
    sizes = [len(group) for group in groups]
    # Indian numbers have groups of two digits (1,00,000). A number that begins with 0 has no groups (0,125).
    is_grouped = sizes[0] <= 3 and sizes[-1] == 3 and {*sizes[1:]} <= {2, 3} and not whole.lstrip("-").startswith("0")
    if (len(groups) == 1 or is_grouped) and (not fraction or fraction.isdecimal()):
        yield Decimal(f"{whole.replace(thousands, '')}.{fraction or 0}")


def _number(answer: str) -> str | None:
    text = unicodedata.normalize("NFKC", answer)
    boxed = _BOXED.findall(text)
    if boxed and _NUMBERS.search(boxed[-1]):
        return _NUMBERS.findall(boxed[-1].replace(r"\,", "").replace("{,}", ","))[-1]
    marks = list(_ANSWER_IS.finditer(text))
    stated = _first_result(text[marks[-1].end() :]) if marks else None
    found = _NUMBERS.findall(text)
    return stated or (found[-1] if found else None)


def _first_result(text: str) -> str | None:
    """Return the first number, or the result of an equation, such as 11 in "5 + 6 = 11".

    The result is the first number after the last equals sign of the line.
    """
    first = _NUMBERS.search(text)
    if first is None:
        return None
    line = text[first.start() :].partition("\n")[0]
    result = _NUMBERS.search(line.rpartition("=")[2])
    return result.group() if result else first.group()


def _choice(answer: str) -> str | None:
    boxed = [found for text in _BOXED.findall(answer) for found in _alone(text)]
    if boxed:
        return boxed[-1]
    marks = list(_ANSWER_IS.finditer(answer))
    after = _alone(answer[marks[-1].end() :]) if marks else []
    if after:
        return after[0]
    found = _LEADING.match(answer) or _TRAILING.search(answer)
    return found.group(1) if found else None


def _alone(text: str) -> list[str]:
    """Return the letters from A to E that stand alone."""
    return [one or other for one, other in _ALONE.findall(text.replace(r"\text", " "))]


def _verdict(transcript: Transcript) -> Verdict:
    expected = transcript.expected
    language = code_of(expected.get("answer_language", expected.get("language", "")))
    right = is_right(transcript.answer or "", expected["answer"], language or "en")
    return Verdict(transcript.prompt_id, transcript.sample, language or "", right)
