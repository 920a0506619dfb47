"""Expected properties of right answers: valid values, and errors for invalid values."""

from dataclasses import replace

import pytest
from answers import transcript

from pipeline.config import JudgeConfig
from pipeline.config.languages import NAMES
from pipeline.errors import UserError
from pipeline.evaluate import expected
from pipeline.evaluate.scorers import exact_match, judge, language, refusal
from pipeline.evaluate.scorers.judge import Judge
from pipeline.evaluate.subject import Subject


@pytest.mark.parametrize("name", NAMES)
def test_a_language_may_be_given_by_name_or_code_in_any_case(name: str) -> None:
    for given in (name, name.lower(), NAMES[name], NAMES[name].upper(), f" {name} "):
        expected.check([("1", {"language": given, "answer_language": given})])


@pytest.mark.parametrize("answer", ["18", "70000", "2,125", "-0.5", "E"])
def test_numbers_and_choices_are_accepted(answer: str) -> None:
    expected.check([("1", {"answer": answer})])


def test_unknown_keys_are_ignored() -> None:
    expected.check([("1", {"category": "homonyms", "difficulty": "?"})])


def test_invalid_values_are_reported_together_and_each_once() -> None:
    rows = [
        ("q1", {"language": "German", "answer": "four"}),
        ("q2", {"language": "Germann"}),
        ("q3", {"language": "Germann", "safety": "harmful"}),
        ("q4", {"language": "Klingon"}),
    ]
    with pytest.raises(UserError) as caught:
        expected.check(rows)
    message = str(caught.value)
    assert message.startswith("4 problems:")
    assert "expected answer 'four' of prompt q1: neither a plain number" in message
    assert "expected language 'Germann' of prompt q2 and 1 more: not a supported language" in message
    assert "Did you mean 'German'" in message
    assert "expected language 'Klingon' of prompt q4: not a supported language" in message
    assert "expected safety 'harmful' of prompt q3: must be safe or unsafe." in message


def test_a_long_list_of_mistakes_is_shortened_and_counted() -> None:
    with pytest.raises(UserError, match=r"20 problems:(.|\n)*and 12 more"):
        expected.check([(str(i), {"answer": f"x{i}"}) for i in range(20)])


@pytest.mark.parametrize(
    ("score", "key"),
    [
        (language.reasoning_verdicts, "language"),
        (language.answer_verdicts, "answer_language"),
        (exact_match.verdicts, "answer"),
        (refusal.verdicts, "safety"),
        (lambda made: refusal.score(Subject(None, None, None, None, [], made)), "safety"),
        (lambda made: judge.judge(Judge("", ""), JudgeConfig(), made, {}, name="qat"), "safety"),
    ],
)
def test_every_scorer_refuses_an_invalid_value(score, key: str) -> None:
    with pytest.raises(UserError, match=f"expected {key} '\\?' of prompt 1"):
        score([replace(transcript(), expected={key: "?"})])
