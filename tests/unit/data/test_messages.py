"""The usual forms of messages mean the same: parts, keys of reasoning, older calls, arguments as text, weights."""

from typing import Any

import pytest

from pipeline.data.conversations import ConversationError
from pipeline.data.parsing import parse_conversation

USER = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "content": "Eight."}
TOOL = {"role": "tool", "content": "8"}
ADD = {"name": "add", "description": "Adds."}


def messages(*row: dict[str, Any], **columns: Any) -> list[Any]:
    return parse_conversation({"messages": list(row), **columns}).messages


def refusal(*row: dict[str, Any], **columns: Any) -> str:
    with pytest.raises(ConversationError) as caught:
        messages(*row, **columns)
    return str(caught.value)


def call(arguments: Any = None, name: str = "add", **more: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
        **more,
    }


# --- content in parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_text_parts_are_joined(role: str, kind: str) -> None:
    parts = [{"type": kind, "text": "One, "}, {"type": kind, "text": "two."}]
    row = {"system": [0], "user": [1], "tool": [3], "assistant": [4]}[role]
    plain = [{"role": "system", "content": "x"}, USER, call(), TOOL, ANSWER]
    changed = [{**m, "content": parts} if i in row else m for i, m in enumerate(plain)]
    joined = [{**m, "content": "One, two."} if i in row else m for i, m in enumerate(plain)]
    assert messages(*changed) == messages(*joined)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal", "thinking", 3])
def test_a_part_that_is_not_text_is_refused_with_its_place(kind: Any) -> None:
    part = {"type": kind, "text": "x"}
    assert refusal({**USER, "content": [{"type": "text", "text": "a"}, part]}, ANSWER).startswith(
        f"messages[0].content[1] is of type {kind!r}, but the model reads only text"
    )


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("image_url", "Remove the part or the row"),
        ("thinking", "Put its text into the message's 'thinking'"),
        ("tool_use", "Write it as the message's 'tool_calls'"),
        ("tool_result", "Write it as a message of its own with the role 'tool'"),
    ],
)
def test_a_part_that_is_not_text_is_refused_with_advice(kind: str, advice: str) -> None:
    assert refusal({**USER, "content": [{"type": kind}]}, ANSWER).endswith(f"). {advice}")


REMEDIES: dict[str, tuple[dict[str, Any], str]] = {
    "a result that is an object": (
        {"messages": [USER, call(), {**TOOL, "content": {"a": 1}}, ANSWER]},
        "messages[2].content is dict, not text. Write it as text in JSON",
    ),
    "content that is a number": (
        {"messages": [{**USER, "content": 3}, ANSWER]},
        "messages[0].content is int, not text. Give a text, which may be empty",
    ),
    "arguments that are a list": (
        {"messages": [USER, call([1])]},
        "messages[1].tool_calls[0].arguments is a list, not an object. Give an object, or its text in JSON",
    ),
    "arguments that are no JSON": ({"messages": [USER, call("a=1")]}, "). Give an object, or its text in JSON"),
    "a tool without description": (
        {"messages": [USER, ANSWER], "tools": [{"name": "add"}]},
        "tools[0] ('add') has no description, which the chat template needs. Add it. It may be an empty text",
    ),
    "late instructions": (
        {"messages": [USER, ANSWER, {"role": "system", "content": "x"}, USER, ANSWER]},
        "messages[2] is a system message in mid-conversation, which the template would drop. Move its text to the first"
        " message, or give it the role 'user'",
    ),
    "late instructions after the parts of a turn": (
        {
            "messages": [
                *(USER, {**ANSWER, "channel": "analysis"}, {**ANSWER, "channel": "final"}),
                *({"role": "system", "content": "x"}, USER, ANSWER),
            ]
        },
        "messages[3] is a system message in mid-conversation",
    ),
}


@pytest.mark.parametrize(("row", "reason"), REMEDIES.values(), ids=REMEDIES.keys())
def test_a_message_that_cannot_be_used_is_refused_with_its_place_and_advice(row: Any, reason: str) -> None:
    assert reason in refusal(*row.pop("messages"), **row)


@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": 3}, 3])
def test_a_part_without_text_is_refused(part: Any) -> None:
    assert refusal({**USER, "content": [part]}, ANSWER).startswith("messages[0].content[0]")


@pytest.mark.parametrize("key", ["images", "audio", "image_url"])
def test_other_media_beside_the_text_are_refused(key: str) -> None:
    assert f"messages[0] has '{key}', but the model reads only text" in refusal({**USER, key: ["cat.png"]}, ANSWER)


def test_an_answer_in_refusal_is_refused() -> None:
    assert "Put the text into 'content'" in refusal(USER, {**ANSWER, "content": None, "refusal": "No."})


# --- reasoning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_found_under_every_usual_key(key: str) -> None:
    assert messages(USER, {**ANSWER, key: "2 times 4"}) == [USER, {**ANSWER, "thinking": "2 times 4"}]


def test_the_same_reasoning_under_two_keys_is_taken_once_and_another_is_refused() -> None:
    same = {**ANSWER, "reasoning": "a", "reasoning_content": "a"}
    assert messages(USER, same) == [USER, {**ANSWER, "thinking": "a"}]
    assert "different reasoning in 'reasoning_content' and 'reasoning'" in refusal(USER, {**same, "reasoning": "b"})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_that_is_not_text_is_refused_with_its_key(key: str) -> None:
    assert (
        refusal(USER, {**ANSWER, key: {"effort": "low"}})
        == f"messages[1].{key} is dict, not text. Write it as text in JSON"
    )


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_weight_zero_is_kept_under_every_usual_key(key: str, value: Any) -> None:
    assert messages(USER, {**ANSWER, key: value}, USER, ANSWER) == [USER, {**ANSWER, "weight": 0}, USER, ANSWER]


@pytest.mark.parametrize("value", [1, True, 1.0, None])
def test_weight_one_is_the_default(value: Any) -> None:
    assert messages(USER, {**ANSWER, "weight": value}) == [USER, ANSWER]


@pytest.mark.parametrize("value", [0.5, 2, -1, "0", [0]])
def test_another_weight_is_refused(value: Any) -> None:
    assert refusal(USER, {**ANSWER, "weight": value}).startswith(f"messages[1] has weight={value!r}. It must be 0")


def test_a_user_message_cannot_be_trained() -> None:
    assert messages({**USER, "weight": 0}, ANSWER) == [USER, ANSWER]
    assert "only assistant messages are trained" in refusal({**USER, "weight": 1}, ANSWER)


def test_a_row_without_a_trained_turn_is_refused() -> None:
    assert "the weight 0 in every assistant message" in refusal(USER, {**ANSWER, "weight": 0})


# --- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", ['{"a": null, "b": [1]}', '"{\\"a\\": null, \\"b\\": [1]}"', {"a": None, "b": [1]}], ids=type
)
def test_arguments_are_an_object_whether_text_or_encoded_twice_and_keep_their_nulls(arguments: Any) -> None:
    _, called, *_ = messages(USER, call(arguments), TOOL, ANSWER)
    assert called["tool_calls"][0]["function"]["arguments"] == {"a": None, "b": [1]}


@pytest.mark.parametrize("arguments", [None, "", " \n", "{}", '"{}"', '""', "null", {}])
def test_no_arguments_are_an_empty_object(arguments: Any) -> None:
    _, called, *_ = messages(USER, call(arguments), TOOL, ANSWER)
    assert called["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("arguments", ["[1]", '"\\"{}\\""', "3", [1], 3, "true"])
def test_arguments_that_are_no_object_are_refused(arguments: Any) -> None:
    assert refusal(USER, call(arguments), ANSWER).startswith("messages[1].tool_calls[0].arguments is a")


def test_the_older_function_call_is_a_tool_call() -> None:
    older = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}}
    result = {"role": "function", "name": "add", "content": "8"}
    assert messages(USER, older, result, ANSWER) == messages(USER, call({"a": 1}), TOOL, ANSWER)


def test_names_may_have_the_namespace_already() -> None:
    tool = {**TOOL, "name": "functions.add"}
    row = {"messages": [USER, call(name="functions.add"), tool, ANSWER], "tools": [{**ADD, "name": "functions.add"}]}
    assert parse_conversation(row) == parse_conversation({"messages": [USER, call(), TOOL, ANSWER], "tools": [ADD]})


@pytest.mark.parametrize("name", ["", "add numbers", "add\n"])
def test_a_name_that_would_break_the_header_is_refused(name: str) -> None:
    assert "A function's name has no white space" in refusal(USER, call(name=name), ANSWER)


def test_a_result_belongs_to_the_call_of_its_id() -> None:
    one, two = call(name="one"), call(name="two")
    one["tool_calls"][0]["id"], two["tool_calls"][0]["id"] = "1", "2"
    results = [{**TOOL, "tool_call_id": "1"}, {**TOOL, "tool_call_id": "2"}]
    *_, first, second, _ = messages(USER, one, two, *results, ANSWER)
    assert (first, second) == ({**TOOL, "name": "one"}, TOOL)


def test_a_result_with_the_id_of_no_earlier_call_is_refused() -> None:
    one = call(name="one")
    one["tool_calls"][0]["id"] = "1"
    assert refusal(USER, one, {**TOOL, "tool_call_id": "7"}, ANSWER) == (
        "messages[2] has tool_call_id='7', but the earlier calls have '1'. Correct the id, or remove it if the result"
        " is of the last call"
    )
    named = {**TOOL, "tool_call_id": "7", "name": "one"}
    assert "messages[2] has tool_call_id='7'" in refusal(USER, one, named, ANSWER)


def test_calls_without_ids_get_results_with_ids_if_only_one_call_can_be_meant() -> None:
    first, second = {**TOOL, "tool_call_id": "1"}, {**TOOL, "tool_call_id": "2"}
    assert messages(USER, call(), first, call(), second, ANSWER) == messages(USER, call(), TOOL, call(), TOOL, ANSWER)
    assert "messages[3] has tool_call_id='1', but the calls before it have no ids" in refusal(
        USER, call(name="one"), call(name="two"), first, second, ANSWER
    )
    named = [{**first, "name": "one"}, {**second, "name": "two"}]
    *_, one, two, _ = messages(USER, call(name="one"), call(name="two"), *named, ANSWER)
    assert (one, two) == ({**TOOL, "name": "one"}, TOOL)


def test_a_result_of_a_function_that_was_not_called_is_refused() -> None:
    assert refusal(USER, call(), {**TOOL, "name": "other"}, ANSWER) == (
        "messages[2] is a result of 'other', but no earlier message calls it"
    )


def test_a_tool_that_is_no_function_is_refused() -> None:
    assert refusal(USER, ANSWER, tools=[{"type": "web_search"}]) == (
        "tools[0] is of type 'web_search', but the model calls only functions. Remove it, or make it a function"
    )
