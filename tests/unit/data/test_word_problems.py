"""Generated word problems: right answers, texts in the right languages, and splits that share no problem."""

import random
import re
from itertools import combinations

import pytest

from pipeline.config.languages import NAMES as CODES
from pipeline.data import word_problems
from pipeline.data.languages import Languages
from pipeline.data.word_problems import LANGUAGES, LEAST, MOST, SPLITS, Problem, problems


def all_of(split: str) -> set[Problem]:
    return {problem for of_steps in problems(split).values() for problem in of_steps}


def test_each_problem_is_in_exactly_one_split() -> None:
    assert not any(all_of(one) & all_of(other) for one, other in combinations(SPLITS, 2))
    numbers = range(LEAST, MOST + 1)
    possible = [Problem(a, (b - a,)) for a in numbers for b in numbers if abs(b - a) >= LEAST]
    possible += [Problem(p.start, (*p.changes, c - p.result)) for p in possible for c in numbers]
    possible = [problem for problem in possible if abs(problem.changes[-1]) >= LEAST]
    assert set.union(*map(all_of, SPLITS)) == {*possible}


def test_the_rows_of_a_split_have_its_problems() -> None:
    random_numbers = random.Random(0)
    for split in SPLITS:
        assert all(word_problems.draw(split, random_numbers)[0] in all_of(split) for _ in range(100))


def test_no_question_is_in_two_splits_or_twice_in_one() -> None:
    asked = [
        (row["reasoning_language"], row["messages"][0]["content"]) for s in SPLITS for row in word_problems.rows(s, 300)
    ]
    assert len({*asked}) == len(asked) == 900


def test_the_reasoning_computes_the_answer() -> None:
    for row in word_problems.rows("test", 300):
        answer = row["messages"][1]
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", answer["thinking"])
        value = int(re.search(r"\d+", answer["thinking"]).group())  # type: ignore[union-attr]
        for before, sign, change, after in steps:
            assert int(before) == value
            value += int(change) if sign == "+" else -int(change)
            assert int(after) == value
        assert row["answer"] == str(value) and re.findall(r"\d+", answer["content"]) == [str(value)]
        assert re.findall(r"\d+", row["messages"][0]["content"])[1:] == [step[2] for step in steps]


@pytest.mark.parametrize("language", LANGUAGES)
def test_reasoning_and_answers_are_recognized_as_their_language(language: str) -> None:
    detector = Languages(list(CODES.values()), "config.languages.NAMES")
    random_numbers = random.Random(1)
    found = set()
    for _ in range(60):
        problem, wording = word_problems.draw("train", random_numbers)
        found.add(detector.of(word_problems.row(problem, wording, language)["messages"][1]["thinking"]))
    answers = [row for row in word_problems.rows("test", 300) if row["answer_language"] == language]
    assert found | {detector.of(row["messages"][1]["content"]) for row in answers} == {CODES[language]}


def test_every_call_gives_the_same_rows() -> None:
    assert word_problems.rows("train", 50) == word_problems.rows("train", 80)[:50]
