"""Numbers and choices are found in answers, at every usual place and in the notation of each language."""

from dataclasses import replace

import pytest
from answers import transcript

from pipeline.evaluate.scorers.exact_match import is_right, verdicts

# language -> (expected number, sentences that contain the number)
SENTENCES = {
    "en": (
        "70000",
        ("The answer is 70,000.", "He earns $70,000.00 in 2 years, so the answer is: **$70,000**.", "70000"),
    ),
    "de": (
        "70000",
        ("Die Antwort lautet 70.000.", "Das macht 70.000 US-Dollar.", "70 000 €", "Antwort: 70'000 Franken"),
    ),
    "fr": ("1234.5", ("La réponse est 1 234,5.", "Cela fait 1\u202f234,50 €.", "Réponse : 1 234,5", "1.234,5")),
    "es": ("1234.5", ("La respuesta es 1.234,5.", "Son 1.234,50 €.", "Respuesta: 1234,5")),
    "it": ("1234.5", ("La risposta è 1.234,5.", "Sono 1.234,50 €.", "Risposta: 1234,5")),
    "pt": ("1234.5", ("A resposta é 1.234,5.", "São 1.234,50 €.")),
    "ru": ("1234.5", ("Ответ: 1 234,5", "Ответ — 1234,5.", "Всего 1 234,50 руб.")),
    "zh": ("70000", ("答案是70,000。", "答案：70000元", "他一共赚了70,000美元。", "答案是７００００。")),
    "ja": ("70000", ("答えは70,000です。", "合計で70000ドルです。", "答え：７００００")),
}


@pytest.mark.parametrize(
    ("language", "sentence"), [(code, text) for code, (_, all_) in SENTENCES.items() for text in all_]
)
def test_a_number_is_read_in_the_notation_of_its_language(language: str, sentence: str) -> None:
    assert is_right(sentence, SENTENCES[language][0], language)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (r"So we get \boxed{18}, of 20 in all.", "18"),
        (r"\boxed{12} was wrong; it is \boxed{18 \text{ eggs}}.", "18"),
        (r"\boxed{70{,}000}", "70000"),
        ("The answer is 18. There were 20 at first.", "18"),
        ("The answer is 5 + 13 = 18.", "18"),
        ("The answer is 18 (5 + 13 = 18, of 20).", "18"),
        ("The answer is:\n18\n5 + 12 = 17", "18"),
        ("First the answer is 3, but then the answer is 18, of 20.", "18"),
        ("There were 20; 2 broke, and 18 are left.", "18"),
        ("-5", "-5"),
        ("It is −5 degrees.", "-5"),
        ("It falls from 10 to 3-5.", "5"),
        ("x = 0.50", "0.5"),
        ("#### 2,125", "2,125"),
    ],
)
def test_the_final_number_is_found(answer: str, number: str) -> None:
    assert is_right(answer, number)


@pytest.mark.parametrize("answer", ["", "I do not know.", "18.5", "180", "1.8", "The answer is 17, not 18.", "1.2.3"])
def test_a_different_or_missing_number_is_wrong(answer: str) -> None:
    assert not is_right(answer, "18")


def test_english_notation_is_accepted_in_languages_with_decimal_commas() -> None:
    assert is_right("Das macht 70,000 US-Dollar.", "70000", "de")
    assert is_right("Das macht 3,125 Liter.", "3.125", "de")
    assert not is_right("That makes 3.125 litres.", "3125", "en")
    assert not is_right("Das macht 0,125 Liter.", "125", "de")


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B) the red one", "B"),
        ("**B**", "B"),
        ("B. Because it is red, not A.", "B"),
        ("Option A is blue, so the answer is E.", "E"),
        (r"\boxed{\text{D}}", "D"),
        ("Die Antwort ist (C), nicht B.", "C"),
        ("La réponse est D.", "D"),
        ("Respuesta: A", "A"),
        ("La risposta è B", "B"),
        ("答案是C。", "C"),
        ("答えはDです", "D"),
        ("We look at each in turn.\nSo I choose\n**D**", "D"),
    ],
)
def test_a_choice_is_found(answer: str, choice: str) -> None:
    assert [each for each in "ABCDE" if is_right(answer, each)] == [choice]


@pytest.mark.parametrize("answer", ["A cat is an animal.", "", "I don't know", "Both of them, or neither"])
def test_a_letter_in_a_sentence_is_not_a_choice(answer: str) -> None:
    assert not any(is_right(answer, choice) for choice in "ABCDE")


def test_a_missing_answer_is_wrong() -> None:
    made = replace(transcript(None, finish="length"), expected={"answer": "18", "language": "German"})
    (found,) = verdicts([made])
    assert (found.passed, found.group) == (False, "de")


def test_transcripts_without_an_expected_answer_do_not_count() -> None:
    assert verdicts([transcript("18", language="German")]) == []
