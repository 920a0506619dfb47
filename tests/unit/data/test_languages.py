"""Languages of texts: one language, a mixture of two languages, or undecided if there are too few words."""

import pytest

from pipeline.config.languages import NAMES
from pipeline.data.languages import MIXED, UNDECIDED, Languages
from pipeline.errors import UserError

CANDIDATES = ["en", "de", "fr", "es", "it", "ru", "zh", "ja", "hi"]
SENTENCES = {
    "en": "The train left the station before anyone had noticed that it was late.",
    "de": "Der Zug verließ den Bahnhof, bevor jemand die Verspätung bemerkt hatte.",
    "fr": "Le train a quitté la gare avant que personne n'ait remarqué son retard.",
    "es": "El tren salió de la estación antes de que nadie notara el retraso.",
    "it": "Il treno lasciò la stazione prima che qualcuno notasse il ritardo.",
    "ru": "Поезд ушёл со станции раньше, чем кто-либо заметил опоздание.",
    "zh": "火车在任何人注意到晚点之前就已经离开了车站。",
    "ja": "誰かが遅れに気づく前に、電車は駅を出発しました。",
    "hi": "किसी के देरी पर ध्यान देने से पहले ही रेलगाड़ी स्टेशन से निकल गई।",
}
CODE = "\n```python\nfor index, value in enumerate(values):\n    print(index, value, sep=', ')\n```\n"


@pytest.fixture(scope="module")
def languages() -> Languages:
    return Languages(CANDIDATES, "doctor.languages")


@pytest.mark.parametrize("language", SENTENCES)
def test_the_language_of_a_sentence_is_found(languages: Languages, language: str) -> None:
    assert languages.of(SENTENCES[language]) == language


@pytest.mark.parametrize("language", SENTENCES)
def test_code_links_formulas_and_tags_do_not_count(languages: Languages, language: str) -> None:
    noise = f"{CODE} https://example.org/the/train/left/the/station $x_{{train}} + y = z$ <b> `the train` "
    assert languages.of(noise + SENTENCES[language] + noise) == language


@pytest.mark.parametrize("language", ["ja", "zh"])
def test_removing_a_formula_without_spaces_keeps_the_words_around_it(languages: Languages, language: str) -> None:
    assert languages.of(SENTENCES[language].replace("。", "5+6=11") + "。") == language


@pytest.mark.parametrize(
    "text", ["", "42", "Ja.", "x = 3 + 4", CODE, "https://example.org/a/long/path/of/words", "😀" * 40]
)
def test_too_little_language_is_undecided(languages: Languages, text: str) -> None:
    assert languages.of(text) == UNDECIDED


def test_short_sentences_are_judged_together(languages: Languages) -> None:
    assert languages.of("Ach so. Das ist gut. Dann gehen wir. Bis morgen.") == "de"


def test_two_languages_in_equal_parts_are_mixed(languages: Languages) -> None:
    assert languages.of(f"{SENTENCES['de']} {SENTENCES['en']}") == MIXED


def test_a_quoted_sentence_does_not_decide(languages: Languages) -> None:
    text = f"{SENTENCES['de']} {SENTENCES['en']} {SENTENCES['de']} {SENTENCES['de']}"
    assert languages.of(text) == "de"


def test_only_declared_languages_are_returned() -> None:
    assert Languages(["en", "de"], "doctor.languages").of(SENTENCES["fr"]) in ("en", "de", MIXED)


def test_the_classifier_knows_every_language_that_has_a_name() -> None:
    assert Languages(list(NAMES.values()), "config.languages.NAMES").of(SENTENCES["de"]) == "de"


def test_unknown_codes_are_named_together_with_their_setting() -> None:
    with pytest.raises(UserError, match=r"doctor\.languages: 'deutsch', 'xx': not known to py3langid"):
        Languages(["en", "xx", "deutsch"], "doctor.languages")
