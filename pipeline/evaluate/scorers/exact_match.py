"""Whether the answer is the expected number or choice, found in free text.

What is compared is, in this order, what stands in the last \\boxed{}, what follows the last "the answer is" in one of
nine languages, and the last number of all. Numbers may have thousands separators and decimal commas: "1.234,5" in
German is "1,234.5" in English. Models also write the English way in other languages, so where a language has decimal
commas both readings are tried: "70,000" in a German answer is right for 70 and for 70000. Fractions, numbers in words
and counting by ten thousands (3万) are not read.
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
"""Languages that write 1,234.5; the others of config.languages.NAMES write 1.234,5."""

_NUMBERS = re.compile(
    r"(?<![\w.,])[-−–]?\d(?:[\d.,'’]*\d|(?: \d{3})+(?!\d))*"
    r"|(?<=[^\W\d_])\d(?:[\d.,]*\d)?"  # after a letter: Chinese has no spaces
)
_SPACING = re.compile(r"['’\s]")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_ANSWER_IS = re.compile(
    r"\banswer(?: is|:)|\bantwort(?: ist| lautet|:)|\bréponse(?: est| ?:)|\brespuesta(?: es|:)|\brisposta(?: è|:)"
    r"|\bresposta(?: é|:)|\bответ\b|答案(?:是|为|為|：|:)|答え(?:は|：|:)",
    re.IGNORECASE,
)
_LATIN = "A-Za-zÀ-ɏ0-9'’"  # what a letter must not touch to stand alone; Chinese and Japanese have no spaces
_ALONE = re.compile(rf"\(([A-E])\)|(?<![{_LATIN}])([A-E])(?![{_LATIN}])")
_LEADING = re.compile(r"\W*([A-E])(?:\W*$|\s*[).:\]]|\*\*)", re.MULTILINE)
_TRAILING = re.compile(rf"(?<![{_LATIN}])([A-E])\W*$")


def score(subject: Subject) -> dict[str, float]:
    """`exact_match`, over all and for each language."""
    return figures("exact_match", verdicts(subject.transcripts))


def verdicts(transcripts: Sequence[Transcript]) -> list[Verdict]:
    """On the transcripts with expected["answer"], a number or a choice; the group is the answer's language.

    An answer that never came, or in which nothing is found, is wrong.

    Raises:
        UserError: what is expected cannot be used (see `expected.check`).
    """
    wanted = [each for each in transcripts if "answer" in each.expected]
    check_all(wanted)
    return [_verdict(each) for each in wanted]


def is_right(answer: str, expected: str, language: str = "en") -> bool:
    """Whether the answer gives what was expected.

    Args:
        answer: of the model.
        expected: a number as "70000", "2,125" or "-0.5", or a letter from A to E.
        language: of the answer, an ISO 639-1 code.
    """
    wanted = expected.strip()
    if CHOICE.fullmatch(wanted):
        return _choice(answer) == wanted
    value = Decimal(wanted.replace(",", ""))
    found = _number(answer)
    return found is not None and value in readings(found, language)


def readings(number: str, language: str) -> list[Decimal]:
    """What a number may mean: in the language's own notation, and where that has decimal commas, in English, too.

    A number that is in neither (1.2.3) means nothing.
    """
    compact = _SPACING.sub("", number).translate({ord("−"): "-", ord("–"): "-"})
    notations = [(",", ".")] if language in _DECIMAL_POINT else [(".", ","), (",", ".")]
    return [value for notation in notations for value in _read(compact, *notation)]


def _read(compact: str, thousands: str, point: str) -> Iterator[Decimal]:
    whole, _, fraction = compact.partition(point)
    groups = whole.lstrip("-").split(thousands)
    sizes = [len(group) for group in groups]
    # Groups of two are India's: 1,00,000. Nobody groups 0,125.
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
    """The first number, or where its line is an equation ("5 + 6 = 11"), the first after the last equals sign."""
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
    """Letters that stand on their own."""
    return [one or other for one, other in _ALONE.findall(text.replace(r"\text", " "))]


def _verdict(transcript: Transcript) -> Verdict:
    expected = transcript.expected
    language = code_of(expected.get("answer_language", expected.get("language", "")))
    right = is_right(transcript.answer or "", expected["answer"], language or "en")
    return Verdict(transcript.prompt_id, transcript.sample, language or "", right)
