"""Errors that report several problems. They show the first few problems, and count all of them."""

import pytest

from pipeline.errors import RowProblems, UserError, at_most, join_errors, list_first, user_errors


def many(count: int, name: str = "row") -> list[str]:
    return [f"{name} {i}: is bad." for i in range(count)]


def test_a_single_problem_is_the_whole_message() -> None:
    for error in (
        user_errors(many(1)),
        user_errors(many(1), most=8),
        join_errors([UserError(*many(1))]),
    ):
        assert str(error) == "row 0: is bad."
        assert (error.problems, error.count) == (["row 0: is bad."], 1)


def test_all_problems_are_reported_together() -> None:
    error = user_errors(many(20))
    assert str(error).splitlines() == ["20 problems:", *(f"  - {problem}" for problem in many(20))]
    assert error.count == 20


@pytest.mark.parametrize("count", [2, 8])
def test_a_list_that_is_short_enough_is_shown_whole(count: int) -> None:
    error = user_errors(many(count), most=8)
    assert error.problems == at_most(many(count)) == many(count)
    assert str(error).startswith(f"{count} problems:\n")


@pytest.mark.parametrize("count", [9, 20])
def test_a_long_list_is_cut_and_announces_the_real_number_of_problems(count: int) -> None:
    shown = [*many(8), f"and {count - 8} more"]
    error = user_errors(many(count), most=8)
    assert str(error).splitlines() == [f"{count} problems:", *(f"  - {line}" for line in shown)]
    assert (error.problems, error.count) == (shown, count)


def test_the_first_names_are_listed_and_the_rest_is_counted() -> None:
    assert [list_first(list("abcde"[:count])) for count in (0, 1, 3, 4)] == ["", "a", "a, b, c", "a, b, c and 1 more"]
    assert list_first(["a", "b"], most=1) == "a and 1 more"
    assert list_first(["a", "b"], total=9) == "a, b and 7 more"


@pytest.mark.parametrize("where", ["a.jsonl: row {}", "row {}"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("reasons", [("has no a",), ("has no a 1", "has no a 2")])
def test_a_group_has_no_empty_part(where: str, count: int, reasons: tuple[str, ...]) -> None:
    text = grouped(*((where.format(i), reasons[i % len(reasons)]) for i in range(count)))
    assert not any(empty in text for empty in ("()", "( ", "(,", " )", ", )", "  ", ": :", "and )", "( and"))
    assert text.count("(") == (count > 1) and text.endswith(".")


def test_joined_errors_show_the_lines_and_the_number_of_all() -> None:
    error = join_errors([user_errors(many(10, "a"), most=8), UserError("c: is not there."), user_errors(many(2, "b"))])
    assert str(error).splitlines() == [
        "13 problems:",
        *(f"  - {line}" for line in many(8, "a")),
        "  - and 2 more",
        "  - c: is not there.",
        *(f"  - {line}" for line in many(2, "b")),
    ]
    assert error.count == 13


def test_an_error_that_several_parts_raise_alike_is_reported_once() -> None:
    assert str(join_errors([UserError("disk: full."), UserError("disk: full.")])) == "disk: full."
    assert join_errors([user_errors(many(2)), user_errors(many(2)), UserError("x")]).count == 3


def grouped(*rows: tuple[str, str], most: int = 8) -> str:
    found = RowProblems(most)
    for where, reason in rows:
        found.add(where, reason)
    with pytest.raises(UserError) as caught:
        found.raise_if_any()
    return str(caught.value)


def test_the_problem_of_one_row_is_a_sentence() -> None:
    assert grouped(("a.jsonl: row 7", "has no answer")) == "a.jsonl: row 7: has no answer."


@pytest.mark.parametrize(
    ("reason", "sentence"),
    [
        ("has no answer", "have no answer."),
        ("begins with an answer", "begin with an answer."),
        ("is a list, not an object", ": each is a list, not an object."),
        ("'tools' is not a list", ": 'tools' is not a list."),
    ],
)
def test_rows_with_the_same_problem_are_one_line_with_a_count_and_the_first_rows(reason: str, sentence: str) -> None:
    rows = [(f"a.jsonl: row {number}", reason) for number in (3, 9, *range(20, 30))]
    separator = "" if sentence.startswith(":") else " "
    assert grouped(*rows) == f"a.jsonl: 12 rows (3, 9, 20 and 9 more){separator}{sentence}"
    assert grouped(*rows[:2]) == f"a.jsonl: 2 rows (3 and 9){separator}{sentence}"


def test_rows_of_several_files_are_named_with_their_files() -> None:
    rows = [("a.jsonl: row 3", "has no answer"), ("b.jsonl: row 1", "has no answer")]
    assert grouped(*rows) == "2 rows (a.jsonl: row 3 and b.jsonl: row 1) have no answer."


def test_problems_that_differ_only_in_numbers_are_one_group() -> None:
    rows = [(f"a.jsonl: row {i}", f"has {i} cells, but the header has 2") for i in (3, 4, 4)]
    expected = "a.jsonl: 3 rows (3, 4 and 4) have similar problems. The first: has 3 cells, but the header has 2."
    assert grouped(*rows) == expected


def test_a_number_that_is_the_same_in_all_rows_stays() -> None:
    rows = [(f"a.jsonl: row {i}", "has 3 cells, but the header has 2") for i in (3, 4)]
    assert grouped(*rows) == "a.jsonl: 2 rows (3 and 4) have 3 cells, but the header has 2."


def test_different_problems_are_listed_and_the_rest_is_counted_with_its_first_rows() -> None:
    rows = [(f"a.jsonl: row {i}", f"has no {name}") for i, name in enumerate("abcb", 1)]
    assert grouped(*rows).splitlines() == [
        "3 problems:",
        "  - a.jsonl: row 1: has no a.",
        "  - a.jsonl: 2 rows (2 and 4) have no b.",
        "  - a.jsonl: row 3: has no c.",
    ]
    assert grouped(*rows, most=1).splitlines() == [
        "2 problems:",
        "  - a.jsonl: row 1: has no a.",
        "  - a.jsonl: 3 rows (2, 3 and 4) have other problems. The first: has no b.",
    ]
    assert grouped(*rows[:2], most=1).splitlines()[-1] == "  - a.jsonl: row 2: has no b."


def test_no_bad_rows_raise_nothing() -> None:
    RowProblems().raise_if_any()
