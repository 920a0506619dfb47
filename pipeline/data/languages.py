"""Identifies the natural language of a text among declared languages. Only this module imports py3langid.

The classifier is confident about any input, even code and numbers. So code and numbers are removed first, and the
remaining text must be long enough. Each sentence is classified and votes for one language. A longer sentence has more
weight: the weight is the size of its letters in bytes. So a short quotation does not decide the result. A text in two
languages counts as mixed. Sentences that are classified with low confidence do not vote.

The confidence threshold comes from a measurement (scripts/measure_scorers, 2026-11-22). The classifier was tested on
sentences of MGSM in seven languages, with 33 languages to choose from. Without a threshold, it chose a language for
5,716 sentences, and was wrong for 22. With a threshold of 0.8, it chose a language for 5,521 sentences (3 % fewer), and
was wrong for one. With this threshold, it was right for 1,746 of 1,750 whole questions (about 50 words each), and
undecided for the other four. Most errors confuse two closely related languages. Most errors occur in Russian sentences.
"""

import copy
import re
from collections import Counter
from functools import cache, cached_property

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from pipeline.config.languages import NAMES
from pipeline.errors import UserError, did_you_mean

UNDECIDED = "undecided"
"""Result for a text that has too little natural language, or whose sentences are all classified with low confidence."""
MIXED = "mixed"
"""Result for a text in which no language has two thirds of the votes."""

_NOT_LANGUAGE = re.compile(
    "|".join(
        (
            r"```.*?(?:```|\Z)",  # fenced code
            r"`[^`\n]*`",
            r"\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\)|\$[^$\n]+\$",  # formulas
            r"https?://[!-~]+|www\.[!-~]+|[!-~]+@[!-~]+",
            r"<[^<>\s][^<>\n]*>",  # tags
            # Paths and operators. The pattern matches only ASCII characters. Otherwise it could match a whole Chinese
            # sentence, because Chinese has no spaces.
            r"[!-~]*[\\/_=<>{}\[\]|#*^+][!-~]*",
        )
    ),
    re.DOTALL,
)
_SENTENCE = re.compile(r"[^.!?。！？…\n]+")
_LEAST_BYTES = 24  # bytes of a sentence's letters in UTF-8: 24 Latin, 12 Cyrillic or 8 Chinese letters
_LEAST_CONFIDENCE = 0.8
_LEAST_SHARE = 2 / 3


class Languages:
    """Identifies the language of a text among the declared languages."""

    def __init__(self, candidates: list[str], key: str) -> None:
        """Declare the languages.

        Args:
            candidates: ISO 639-1 codes.
            key: key of the setting that lists the codes, for messages.

        Raises:
            UserError: the classifier does not know some codes. The error names all unknown codes.
        """
        self._candidates = candidates
        if not set(candidates) <= set(NAMES.values()):  # the classifier knows these
            _raise_if_unknown(candidates, key)

    @cached_property
    def _identifier(self) -> LanguageIdentifier:
        """The classifier. Many data sets have no text that is long enough for it, and loading it takes time."""
        identifier = copy.copy(_every_language())
        identifier.set_languages(self._candidates)
        return identifier

    def of(self, text: str) -> str:
        """Return the code of the language with at least two thirds of the votes, or MIXED, or UNDECIDED."""
        votes: Counter[str] = Counter()
        prose = _NOT_LANGUAGE.sub(" ", text)
        for sentence in _join_short(_SENTENCE.findall(prose)):
            language, confidence = self._identifier.classify(sentence)
            if confidence >= _LEAST_CONFIDENCE:
                votes[language] += _letter_bytes(sentence)
        if not votes:
            return UNDECIDED
        language, most = votes.most_common(1)[0]
        return language if most >= _LEAST_SHARE * votes.total() else MIXED


@cache
def _every_language() -> LanguageIdentifier:
    """Load the classifier once, because that takes a quarter of a second. Choose languages only for copies of it."""
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)  # confidences are probabilities


def _raise_if_unknown(candidates: list[str], key: str) -> None:
    known = _every_language().labels
    if unknown := sorted(set(candidates) - set(known)):
        raise UserError(
            f"{key}: {', '.join(map(repr, unknown))}: not known to py3langid.{did_you_mean(unknown[0], known)} Use"
            " ISO 639-1 codes, such as en, de, zh."
        )


def _join_short(sentences: list[str]) -> list[str]:
    """Join short sentences with the sentences that follow, until each text is long enough for the classifier."""
    joined: list[str] = []
    pending = ""
    for sentence in sentences:
        pending = f"{pending} {sentence}"
        if _letter_bytes(pending) >= _LEAST_BYTES:
            joined.append(pending)
            pending = ""
    if joined:
        joined[-1] += pending
    return joined


def _letter_bytes(text: str) -> int:
    return len("".join(filter(str.isalpha, text)).encode())
