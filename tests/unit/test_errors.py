"""Errors that report several problems. They show the first few problems, and count all of them."""

import pytest

from pipeline.errors import Problems, UserError, at_most, joined, user_errors


def many(count: int, name: str = "row") -> list[str]:
    return [f"{name} {i}: is bad." for i in range(count)]


def collected(problems: list[str], most: int = 8) -> UserError:
    found = Problems(most)
    for problem in problems:
        found.add(problem)
    with pytest.raises(UserError) as caught:
        found.raise_if_any()
    return caught.value


def test_a_single_problem_is_the_whole_message() -> None:
    for error in (
        user_errors(many(1)),
        user_errors(many(1), most=8),
        collected(many(1)),
        joined([UserError(*many(1))]),
    ):
        assert str(error) == "row 0: is bad."
        assert (error.problems, error.count) == (["row 0: is bad."], 1)


def test_all_problems_are_reported_together() -> None:
    error = user_errors(many(20))
    assert str(error).splitlines() == ["20 problems:", *(f"  - {problem}" for problem in many(20))]
    assert error.count == 20


@pytest.mark.parametrize("count", [2, 8])
def test_a_list_that_is_short_enough_is_shown_whole(count: int) -> None:
    for error in (user_errors(many(count), most=8), collected(many(count))):
        assert error.problems == at_most(many(count)) == many(count)
        assert str(error).startswith(f"{count} problems:\n")


@pytest.mark.parametrize("count", [9, 20])
def test_a_long_list_is_cut_and_announces_the_real_number_of_problems(count: int) -> None:
    shown = [*many(8), f"and {count - 8} more"]
    for error in (user_errors(many(count), most=8), collected(many(count))):
        assert str(error).splitlines() == [f"{count} problems:", *(f"  - {line}" for line in shown)]
        assert (error.problems, error.count) == (shown, count)


def test_a_collector_without_problems_raises_nothing() -> None:
    found = Problems()
    found.raise_if_any()
    assert found.lines() == []


def test_a_collector_can_show_fewer() -> None:
    assert collected(many(3), most=1).problems == ["row 0: is bad.", "and 2 more"]


def test_joined_errors_show_the_lines_and_the_number_of_all() -> None:
    error = joined([collected(many(10, "a")), UserError("c: is not there."), collected(many(2, "b"))])
    assert str(error).splitlines() == [
        "13 problems:",
        *(f"  - {line}" for line in many(8, "a")),
        "  - and 2 more",
        "  - c: is not there.",
        *(f"  - {line}" for line in many(2, "b")),
    ]
    assert error.count == 13


def test_an_error_that_several_parts_raise_alike_is_reported_once() -> None:
    assert str(joined([UserError("disk: full."), UserError("disk: full.")])) == "disk: full."
    assert joined([collected(many(2)), collected(many(2)), UserError("x")]).count == 3
