"""Verdicts give rates and comparisons of two models. Undecided verdicts are omitted."""

import pytest

from pipeline.evaluate.statistics import BETTER, wilson
from pipeline.evaluate.statistics import verdict as compare_models
from pipeline.evaluate.verdicts import Verdict, figures, pair


def verdict(prompt_id: str, passed: bool | None, group: str = "", sample: int = 0) -> Verdict:
    return Verdict(prompt_id, sample, group, passed)


def test_undecided_verdicts_are_omitted_from_the_rate_and_counted() -> None:
    found = figures("x", [verdict("a", True), verdict("b", False), verdict("c", None), verdict("d", True)])
    assert found["x"] == pytest.approx(2 / 3)
    assert (found["x_decided"], found["x_undecided"]) == (3, 0.25)
    assert (found["x_low"], found["x_high"]) == (wilson(2, 3).low, wilson(2, 3).high)


def test_each_group_has_its_own_figures() -> None:
    found = figures("x", [verdict("a", True, "de"), verdict("b", False, "fr"), verdict("c", None, "fr")])
    assert (found["x/de"], found["x/fr"], found["x_undecided/fr"]) == (1.0, 0.0, 0.5)


def test_without_a_decided_verdict_there_is_no_rate() -> None:
    assert figures("x", [verdict("a", None)]) == {"x_decided": 0.0, "x_undecided": 1.0}
    assert figures("x", []) == {}


def test_a_prompt_with_many_answers_counts_once() -> None:
    answers = [verdict("a", True, sample=i) for i in range(9)] + [verdict("b", False)]
    assert figures("x", answers)["x"] == 0.5


def test_several_answers_to_a_prompt_do_not_narrow_the_interval() -> None:
    answers = [verdict(str(prompt), prompt % 4 > 0, sample=i) for prompt in range(20) for i in range(10)]
    found = figures("x", answers)
    assert (found["x_low"], found["x_high"]) == (wilson(15, 20).low, wilson(15, 20).high)


def test_models_are_paired_by_prompt_where_both_are_decided() -> None:
    model = [verdict("b", True), verdict("a", False), verdict("c", None), verdict("d", True)]
    reference = [verdict("a", True), verdict("b", True), verdict("c", True), verdict("e", True)]
    first, second = pair(model, reference)
    assert (first.tolist(), second.tolist()) == ([False, True], [True, True])


def test_two_models_are_compared_on_the_prompts_that_both_have() -> None:
    model = [verdict(str(i), True) for i in range(12)]
    reference = [verdict(str(i), i % 2 == 0) for i in range(20)]
    assert compare_models(*pair(model, reference)) == BETTER
