"""One message for each Harmony channel means the same as one message with thinking, content and a call."""

from typing import Any

import pytest

from pipeline.data.conversations import ConversationError
from pipeline.data.harmony import Rendering, examples
from pipeline.data.parsing import parse_conversation

USER = {"role": "user", "content": "How many?"}
THINKING = {"role": "assistant", "channel": "analysis", "content": "2 times 4"}
PREAMBLE = {"role": "assistant", "channel": "commentary", "content": "I look."}
FINAL = {"role": "assistant", "channel": "final", "content": "Eight."}
CALL = {
    "role": "assistant",
    "channel": "commentary",
    "recipient": "functions.add",
    "content_type": "<|constrain|>json",
    "content": '{"a": 2}',
}
RESULT = {"role": "tool", "name": "functions.add", "channel": "commentary", "recipient": "assistant", "content": "8"}
CALLS = [{"function": {"name": "add", "arguments": {"a": 2}}}]


def parsed(*messages: dict[str, Any]) -> list[Any]:
    return parse_conversation({"messages": list(messages)}).messages


def refusal(*messages: dict[str, Any]) -> str:
    with pytest.raises(ConversationError) as caught:
        parsed(*messages)
    return str(caught.value)


SAME: dict[str, tuple[list[Any], list[Any]]] = {
    "reasoning beside an empty analysis": (
        [USER, {**THINKING, "content": "", "thinking": "2 times 4"}, FINAL],
        [USER, {"role": "assistant", "thinking": "2 times 4", "content": "Eight."}],
    ),
    "reasoning of a call with a recipient": (
        [USER, {**CALL, "thinking": "2 times 4"}, RESULT, FINAL],
        [
            USER,
            {"role": "assistant", "thinking": "2 times 4", "content": "", "tool_calls": CALLS},
            {"role": "tool", "name": "add", "content": "8"},
            {"role": "assistant", "content": "Eight."},
        ],
    ),
    "analysis before tool calls without a channel": (
        [USER, THINKING, {"role": "assistant", "content": "", "tool_calls": CALLS}, RESULT, FINAL],
        [
            USER,
            {"role": "assistant", "thinking": "2 times 4", "content": "", "tool_calls": CALLS},
            {"role": "tool", "name": "add", "content": "8"},
            {"role": "assistant", "content": "Eight."},
        ],
    ),
    "reasoning and answer": (
        [USER, THINKING, FINAL],
        [USER, {"role": "assistant", "thinking": "2 times 4", "content": "Eight."}],
    ),
    "answer alone": ([USER, FINAL], [USER, {"role": "assistant", "content": "Eight."}]),
    "reasoning and call": (
        [USER, THINKING, CALL, RESULT, FINAL],
        [
            *(USER, {"role": "assistant", "thinking": "2 times 4", "content": "", "tool_calls": CALLS}),
            *({"role": "tool", "content": "8"}, {"role": "assistant", "content": "Eight."}),
        ],
    ),
    "text before a call": (
        [USER, THINKING, PREAMBLE, CALL, RESULT, FINAL],
        [
            *(USER, {"role": "assistant", "thinking": "2 times 4", "content": "I look.", "tool_calls": CALLS}),
            *({"role": "tool", "content": "8"}, {"role": "assistant", "content": "Eight."}),
        ],
    ),
    "two turns": (
        [USER, THINKING, FINAL, USER, THINKING, FINAL],
        [USER, {"role": "assistant", "thinking": "2 times 4", "content": "Eight."}] * 2,
    ),
}


@pytest.mark.parametrize(("by_channel", "joined"), SAME.values(), ids=SAME.keys())
def test_the_messages_of_a_turn_have_the_tokens_of_one_message(
    tokenizer: Any, by_channel: list[Any], joined: list[Any]
) -> None:
    # The template refuses reasoning and text before the same call.
    for form in ("harmony",) if PREAMBLE in by_channel else ("harmony", "template"):
        how = Rendering(tokenizer, "medium", "2025-08-05", every_turn=True, form=form)
        ours, theirs = (parse_conversation({"messages": messages}) for messages in (by_channel, joined))
        assert examples(ours, how) == examples(theirs, how)


def test_text_before_an_answer_is_a_message_of_its_own(tokenizer: Any) -> None:
    how = Rendering(tokenizer, "medium", "2025-08-05", every_turn=True)
    (example,) = examples(parse_conversation({"messages": [USER, THINKING, PREAMBLE, FINAL]}), how)
    assert tokenizer.decode(example["input_ids"]).endswith(
        "<|start|>assistant<|channel|>analysis<|message|>2 times 4<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Eight.<|return|>"
    )


@pytest.mark.parametrize("weight", [0, 1])
def test_a_weight_of_all_parts_is_the_weight_of_the_turn(weight: int) -> None:
    *_, turn, _, _ = parsed(USER, {**THINKING, "weight": weight}, {**FINAL, "weight": weight}, USER, FINAL)
    assert turn.get("weight", 1) == weight


REFUSED: dict[str, tuple[list[Any], str]] = {
    "reasoning without an answer": (
        [USER, FINAL, USER, THINKING],
        "messages[3] is in the channel 'analysis', but no message of the same turn in the channel 'final'",
    ),
    "reasoning before a question": ([USER, THINKING, USER, FINAL], "messages[1] is in the channel 'analysis', but"),
    "reasoning twice": ([USER, THINKING, THINKING, FINAL], "messages[1] to messages[3] are one turn"),
    "another order": ([USER, PREAMBLE, THINKING, FINAL], "messages[1] to messages[3] are one turn"),
    "unknown channel": ([USER, {**THINKING, "channel": "thoughts"}, FINAL], "unknown channel 'thoughts'"),
    "unknown channel at the end": (
        [USER, {**FINAL, "channel": "secret"}],
        "messages[1] has the unknown channel 'secret'",
    ),
    "different weights": ([USER, {**THINKING, "weight": 0}, FINAL], "are one turn, but have different weights"),
    "a call of no function": ([USER, {**CALL, "recipient": "python"}, FINAL], "only functions.<name> can be called"),
    "a call in another channel": ([USER, {**CALL, "channel": "analysis"}, FINAL], "in the channel 'analysis'"),
    "reasoning twice, once as thinking": ([USER, THINKING, {**FINAL, "thinking": "x"}], "has reasoning of its own"),
    "tool calls in another channel": ([USER, {**FINAL, "tool_calls": CALLS}], "in the channel 'final'"),
    "arguments that are no object": ([USER, {**CALL, "content": "[1]"}, FINAL], "messages[1].arguments is a list"),
    "channel of another type": ([USER, {**FINAL, "channel": 3}], "messages[1].channel is int, not text"),
}


@pytest.mark.parametrize(("messages", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_parts_that_make_no_turn_are_refused(messages: list[Any], reason: str) -> None:
    assert reason in refusal(*messages)
