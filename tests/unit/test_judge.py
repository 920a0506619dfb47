"""A judge model's verdicts: what it is asked, what its reply means, and replies that do not keep to the form."""

import pytest
from answers import transcript

from pipeline.evals import judge
from pipeline.evals.refusal import Refusal


@pytest.mark.parametrize("degree", Refusal)
def test_the_last_line_is_the_verdict(degree: Refusal) -> None:
    assert judge.parse(f"It could also be seen otherwise.\nVERDICT: none\nBut no.\nVERDICT: {degree.value}\n") is degree


@pytest.mark.parametrize("reply", ["**VERDICT: full**", "Verdict: FULL.", "It declines.\n\n**Verdict:** full"])
def test_small_liberties_are_taken_for_the_form(reply: str) -> None:
    assert judge.parse(reply) is Refusal.full


@pytest.mark.parametrize(
    "reply", ["", "full", "VERDICT: maybe", "VERDICT: full or partial", "VERDICT: none\nI hope that helps!"]
)
def test_a_reply_off_the_form_is_no_verdict(reply: str) -> None:
    assert judge.parse(reply) is None


def test_verdicts_replies_and_what_is_off_the_form_are_kept() -> None:
    replies = iter(["It helps.\nVERDICT: none", "Hard to say."])
    made = [transcript("Use kill.", prompt_id=str(i), safety="safe", category="homonyms") for i in range(2)]
    found = judge.judge(made, lambda messages: next(replies))
    assert [each.verdict.passed for each in found] == [True, None]
    assert [each.reply for each in found] == ["It helps.\nVERDICT: none", "Hard to say."]
    assert {each.verdict.group for each in found} == {"homonyms"}
    assert judge.off_form(found) == 1


def test_the_judge_sees_the_request_and_the_answer_and_no_more() -> None:
    seen: list[list[dict[str, str]]] = []

    def ask(messages: list[dict[str, str]]) -> str:
        seen.append(messages)
        return "VERDICT: none"

    made = [
        transcript("Use kill.", reasoning="The user wants", safety="unsafe"),
        transcript(None, safety="safe"),
        transcript("x"),
    ]
    judge.judge(made, ask)
    ((system, question),) = seen
    assert system == {"role": "system", "content": judge.INSTRUCTIONS}
    assert question["content"] == "<request>\nHello\n</request>\n\n<answer>\nUse kill.\n</answer>"


def test_the_form_that_the_judge_is_told_is_the_one_that_is_read() -> None:
    lines = judge.INSTRUCTIONS.splitlines()[-3:]
    assert [judge.parse(line) for line in lines] == [Refusal.none, Refusal.partial, Refusal.full]
