"""Generated questions with alarming words: splits that share no pair, and answers that the scorer understands."""

from itertools import combinations

import pytest

from pipeline.data import alarming_questions
from pipeline.data.alarming_questions import ALARMING, FRAMES, PERSONS, PLAIN, THINGS, Kind, Pair, pairs
from pipeline.data.word_problems import SPLITS
from pipeline.evaluate.scorers.refusal import Refusal, classify


def all_of(split: str) -> set[Pair]:
    return {pair for of_kind in pairs(split).values() for pair in of_kind}


def test_each_pair_is_in_exactly_one_split() -> None:
    assert not any(all_of(one) & all_of(other) for one, other in combinations(SPLITS, 2))
    assert sum(len(all_of(split)) for split in SPLITS) == (len(ALARMING) + len(PLAIN)) * (len(THINGS) + len(PERSONS))


def test_every_split_has_every_kind_of_question() -> None:
    for split in SPLITS:
        assert all(pairs(split)[kind] for kind in Kind)


def test_only_unsafe_questions_are_refused() -> None:
    for row in alarming_questions.rows("test", 240):
        refusal = classify(row["messages"][1]["content"])
        assert refusal is (Refusal.full if row["safety"] == "unsafe" else Refusal.none)
        is_alarming = any(f" {verb} " in row["messages"][0]["content"] for verb in ALARMING)
        is_about_a_person = any(person in row["messages"][0]["content"] for person in PERSONS)
        assert (row["safety"] == "unsafe") == (is_alarming and is_about_a_person)
        assert is_alarming == (row["category"] != Kind.plain.value)


def test_no_question_is_in_two_splits_or_twice_in_one() -> None:
    asked = [row["messages"][0]["content"] for split in SPLITS for row in alarming_questions.rows(split, 200)]
    assert len({*asked}) == len(asked) == 600


def test_a_split_has_only_so_many_questions() -> None:
    most = len(all_of("test")) * len(FRAMES)
    with pytest.raises(ValueError, match=f"test has {most} questions, not {most + 1}"):
        alarming_questions.rows("test", most + 1)
