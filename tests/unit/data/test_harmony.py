"""With data.rendering=template, prompts and supervised tokens are those of gpt-oss' own chat template.

Invalid rows are refused.
"""

import copy
import datetime
import re
from typing import Any

import pytest
from data_files import ADD_FUNCTION

from pipeline.checkpoints.gpt_oss import SPECIAL_TOKENS
from pipeline.data.conversations import ConversationError
from pipeline.data.harmony import IGNORED, Rendering, examples
from pipeline.data.parsing import parse_conversation

DATE = "2025-08-05"
SYSTEM = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: 2025-08-05\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
)
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
QUESTION = {"role": "user", "content": "What is 2 + 3?"}
ANSWER = {"role": "assistant", "thinking": "2 + 3 = 5", "content": "5"}
TWO_TURNS = [
    QUESTION,
    ANSWER,
    {"role": "user", "content": "And 4 more?"},
    {"role": "assistant", "thinking": "5 + 4 = 9", "content": "9"},
]
ADD = {"type": "function", "function": ADD_FUNCTION}
CALL = {
    "role": "assistant",
    "thinking": "I can add.",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}],
}
TOOL = {"role": "tool", "content": "5"}
TOOL_ROW = {
    "tools": [ADD],
    "messages": [QUESTION, CALL, TOOL, {"role": "assistant", "thinking": "So 5.", "content": "It is 5."}],
}


def rendering(tokenizer: Any, **changes: Any) -> Rendering:
    return Rendering(
        **{
            "tokenizer": tokenizer,
            "reasoning_effort": "medium",
            "conversation_date": DATE,
            "every_turn": True,
            "form": "template",
            **changes,
        }
    )


def render(tokenizer: Any, row: dict[str, Any], **changes: Any) -> list[dict[str, list[int]]]:
    return examples(parse_conversation(row), rendering(tokenizer, **changes))


def prompt_of(tokenizer: Any, example: dict[str, list[int]]) -> str:
    """Decode the tokens before the first supervised token."""
    first = next(i for i, label in enumerate(example["labels"]) if label != IGNORED)
    return tokenizer.decode(example["input_ids"][:first])


def completion_of(tokenizer: Any, example: dict[str, list[int]]) -> str:
    """Decode the supervised tokens."""
    return tokenizer.decode([label for label in example["labels"] if label != IGNORED])


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """Split ids into single special tokens and the texts between them."""
    special = set(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS.values())))
    found: list[str] = []
    text: list[int] = []
    for token in [*ids, None]:
        if text and (token is None or token in special):
            found.append(tokenizer.decode(text))
            text = []
        if token in special:
            found.append(tokenizer.decode([token]))
        elif token is not None:
            text.append(token)
    return found


def by_template(tokenizer: Any, messages: list[dict[str, Any]], for_generation: bool, **variables: Any) -> str:
    """Render with the chat template, and replace today's date by the pinned date."""
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=for_generation, **{"reasoning_effort": "medium", **variables}
    )
    pinned, replaced = re.subn(r"Current date: \d{4}-\d\d-\d\d", f"Current date: {DATE}", text)
    assert replaced == 1
    return pinned


def refusal(row: Any) -> str:
    with pytest.raises(ConversationError) as caught:
        parse_conversation(row)
    return str(caught.value)


# --- supervised tokens -----------------------------------------------------------------------------------------------


def test_only_the_completion_is_supervised(tokenizer: Any) -> None:
    first, second = render(tokenizer, {"messages": TWO_TURNS})
    expected = {
        "2 + 3 = 5": (first, "5"),
        "5 + 4 = 9": (second, "9"),
    }
    for thinking, (example, answer) in expected.items():
        supervised = [label for label in example["labels"] if label != IGNORED]
        assert pieces(tokenizer, supervised) == [
            *("<|channel|>", "analysis", "<|message|>", thinking, "<|end|>"),
            *("<|start|>", "assistant", "<|channel|>", "final", "<|message|>", answer, "<|return|>"),
        ]
        prompt_length = len(example["labels"]) - len(supervised)
        assert example["labels"] == [IGNORED] * prompt_length + example["input_ids"][prompt_length:]
        assert pieces(tokenizer, example["input_ids"][:prompt_length])[-2:] == ["<|start|>", "assistant"]


def test_an_answer_without_thinking_goes_straight_to_the_final_channel(tokenizer: Any) -> None:
    (example,) = render(tokenizer, {"messages": [USER, ASSISTANT]})
    assert completion_of(tokenizer, example) == "<|channel|>final<|message|>hello<|return|>"


def test_every_turn_has_its_prompt_at_inference(tokenizer: Any) -> None:
    first, second = render(tokenizer, {"messages": TWO_TURNS})
    assert prompt_of(tokenizer, first) == by_template(tokenizer, TWO_TURNS[:1], True)
    assert prompt_of(tokenizer, second) == by_template(tokenizer, TWO_TURNS[:3], True)
    assert prompt_of(tokenizer, first) == f"{SYSTEM}<|start|>user<|message|>What is 2 + 3?<|end|><|start|>assistant"


def test_the_reasoning_of_earlier_turns_is_not_in_later_prompts(tokenizer: Any) -> None:
    _, second = render(tokenizer, {"messages": TWO_TURNS})
    prompt = prompt_of(tokenizer, second)
    assert "2 + 3 = 5" not in prompt
    assert "<|start|>assistant<|channel|>final<|message|>5<|end|>" in prompt
    assert "<|return|>" not in prompt


def test_the_ids_equal_those_of_the_whole_text(tokenizer: Any) -> None:
    for row in ({"messages": TWO_TURNS}, TOOL_ROW):
        for example in render(tokenizer, row):
            text = tokenizer.decode(example["input_ids"])
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == example["input_ids"]


def test_supervising_only_the_last_turn_gives_one_example(tokenizer: Any) -> None:
    *_, last = render(tokenizer, {"messages": TWO_TURNS})
    assert render(tokenizer, {"messages": TWO_TURNS}, every_turn=False) == [last]


@pytest.mark.parametrize("opening", ["system", "developer", None])
def test_a_single_turn_equals_the_templates_training_rendering(tokenizer: Any, opening: str | None) -> None:
    instructions = [{"role": opening, "content": "Be brief."}] if opening else []
    messages = [*instructions, QUESTION, ANSWER]
    (example,) = render(tokenizer, {"messages": messages})
    assert tokenizer.decode(example["input_ids"]) == by_template(tokenizer, messages, False)


def test_messages_after_the_last_assistant_turn_are_ignored(tokenizer: Any) -> None:
    assert render(tokenizer, {"messages": [QUESTION, ANSWER, USER]}) == render(
        tokenizer, {"messages": [QUESTION, ANSWER]}
    )


# --- tools -----------------------------------------------------------------------------------------------------------


def test_a_tool_call_is_supervised_up_to_the_call_token(tokenizer: Any) -> None:
    call, final = render(tokenizer, TOOL_ROW)
    assert pieces(tokenizer, [label for label in call["labels"] if label != IGNORED]) == [
        *("<|channel|>", "analysis", "<|message|>", "I can add.", "<|end|>"),
        *("<|start|>", "assistant to=functions.add", "<|channel|>", "commentary json"),
        *("<|message|>", '{"a": 2, "b": 3}', "<|call|>"),
    ]
    assert completion_of(tokenizer, final) == (
        "<|channel|>analysis<|message|>So 5.<|end|><|start|>assistant<|channel|>final<|message|>It is 5.<|return|>"
    )


def test_the_reasoning_of_a_tool_call_stays_until_the_final_answer(tokenizer: Any) -> None:
    _, final = render(tokenizer, TOOL_ROW)
    prompt = prompt_of(tokenizer, final)
    as_object = {**CALL, "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": 3}}}]}
    assert prompt == by_template(tokenizer, [QUESTION, as_object, TOOL], True, tools=[ADD])
    assert prompt.endswith(
        "<|start|>assistant<|channel|>analysis<|message|>I can add.<|end|>"
        '<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{"a": 2, "b": 3}<|call|>'
        '<|start|>functions.add to=assistant<|channel|>commentary<|message|>"5"<|end|><|start|>assistant'
    )


def test_the_reasoning_of_a_tool_call_is_dropped_after_the_final_answer(tokenizer: Any) -> None:
    row = {**TOOL_ROW, "messages": [*TOOL_ROW["messages"], USER, ASSISTANT]}
    prompt = prompt_of(tokenizer, render(tokenizer, row)[-1])
    assert "I can add." not in prompt
    assert 'to=functions.add<|channel|>commentary json<|message|>{"a": 2, "b": 3}<|call|>' in prompt


def test_two_calls_in_a_row_are_two_examples_that_keep_their_reasoning(tokenizer: Any) -> None:
    second = {**CALL, "thinking": "And again."}
    row = {**TOOL_ROW, "messages": [QUESTION, CALL, TOOL, second, TOOL, ASSISTANT]}
    one, two, final = (prompt_of(tokenizer, example) for example in render(tokenizer, row))
    assert "I can add." not in one
    assert "I can add." in two and "And again." not in two
    assert "I can add." in final and "And again." in final


def test_tool_schemas_are_in_the_developer_message_of_every_prompt(tokenizer: Any) -> None:
    schema = (
        "<|start|>developer<|message|># Tools\n\n## functions\n\nnamespace functions {\n\n"
        "// Adds two numbers.\ntype add = (_: {\na: number,\nb: number,\n}) => any;\n\n} // namespace functions<|end|>"
    )
    assert all(schema in prompt_of(tokenizer, example) for example in render(tokenizer, TOOL_ROW))


@pytest.mark.parametrize(
    "tools",
    [
        [ADD["function"]],
        '[{"type": "function", "function": {"name": "add", "description": "Adds two numbers.", "parameters": {"type":'
        ' "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}}}]',
    ],
    ids=["bare functions", "JSON text"],
)
def test_tool_schemas_may_be_bare_functions_or_json_text(tools: Any) -> None:
    assert parse_conversation({**TOOL_ROW, "tools": tools}) == parse_conversation(TOOL_ROW)


@pytest.mark.parametrize("tools", [None, [], "[]"])
def test_empty_tools_change_nothing(tokenizer: Any, tools: Any) -> None:
    row = {"messages": [USER, ASSISTANT]}
    assert render(tokenizer, {**row, "tools": tools}) == render(tokenizer, row)


@pytest.mark.parametrize(
    "tool_call",
    [
        {"function": {"name": "add", "arguments": {"a": 2, "b": 3}}},
        {"name": "add", "arguments": '{"a": 2, "b": 3}'},
        {"name": "add", "arguments": {"a": 2, "b": 3}, "function": None},
    ],
)
def test_a_tool_call_may_be_bare_and_its_arguments_an_object(tool_call: dict[str, Any]) -> None:
    messages = [QUESTION, {**CALL, "tool_calls": [tool_call]}, TOOL, ASSISTANT]
    assert parse_conversation({"messages": messages}) == parse_conversation(
        {"messages": [QUESTION, CALL, TOOL, ASSISTANT]}
    )


def test_a_call_without_arguments_sends_an_empty_object(tokenizer: Any) -> None:
    row = {"messages": [QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": "now"}}]}]}
    (example,) = render(tokenizer, row)
    assert completion_of(tokenizer, example) == " to=functions.now<|channel|>commentary json<|message|>{}<|call|>"


# --- the system message ----------------------------------------------------------------------------------------------


def test_a_rows_reasoning_effort_takes_precedence_over_the_data_sets(tokenizer: Any) -> None:
    row = {"messages": [USER, ASSISTANT]}
    (plain,) = render(tokenizer, row, reasoning_effort="high")
    (own,) = render(tokenizer, {**row, "reasoning_effort": "low"}, reasoning_effort="high")
    assert "\nReasoning: high\n" in prompt_of(tokenizer, plain)
    assert "\nReasoning: low\n" in prompt_of(tokenizer, own)
    assert prompt_of(tokenizer, own) == by_template(tokenizer, [USER], True, reasoning_effort="low")


def test_the_conversation_date_is_pinned(tokenizer: Any) -> None:
    (example,) = render(tokenizer, {"messages": [USER, ASSISTANT]}, conversation_date="1999-12-31")
    prompt = prompt_of(tokenizer, example)
    assert re.findall(r"\d{4}-\d\d-\d\d", prompt) == ["1999-12-31"]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_reasoning_language_is_the_first_line_of_the_instructions(tokenizer: Any, role: str) -> None:
    row = {"messages": [{"role": role, "content": "Be brief."}, *TWO_TURNS], "reasoning_language": "French"}
    stated = [{"role": role, "content": "reasoning language: French\n\nBe brief."}, *TWO_TURNS]
    assert render(tokenizer, row) == render(tokenizer, {"messages": stated})


def test_without_instructions_the_reasoning_language_is_the_only_one(tokenizer: Any) -> None:
    (example,) = render(tokenizer, {"messages": [USER, ASSISTANT]}, reasoning_language="German")
    assert prompt_of(tokenizer, example) == (
        f"{SYSTEM}<|start|>developer<|message|># Instructions\n\nreasoning language: German\n\n<|end|>"
        "<|start|>user<|message|>hi<|end|><|start|>assistant"
    )


STATED = {"role": "system", "content": "reasoning language: French\n\nBe brief."}


@pytest.mark.parametrize("own", [None, "French", "french "])
def test_a_stated_reasoning_language_is_not_added_again(tokenizer: Any, own: str | None) -> None:
    row = {"messages": [STATED, USER, ASSISTANT]}
    for language in (None, "German"):
        again = render(tokenizer, {**row, "reasoning_language": own}, reasoning_language=language)
        assert again == render(tokenizer, row)
        assert prompt_of(tokenizer, again[0]).count("language") == SYSTEM.count("language") + 1


def test_a_rows_reasoning_language_takes_precedence_over_the_data_sets(tokenizer: Any) -> None:
    row = {"messages": [USER, ASSISTANT], "reasoning_language": "French"}
    (example,) = render(tokenizer, row, reasoning_language="German")
    assert "reasoning language: French\n" in prompt_of(tokenizer, example)
    assert "German" not in prompt_of(tokenizer, example)


def test_the_reasoning_language_comes_before_instructions_that_were_joined(tokenizer: Any) -> None:
    both = [{"role": "system", "content": "One."}, {"role": "developer", "content": "Two."}]
    (example,) = render(tokenizer, {"messages": [*both, USER, ASSISTANT], "reasoning_language": "French"})
    assert "# Instructions\n\nreasoning language: French\n\nOne.\n\nTwo.\n\n<|end|>" in prompt_of(tokenizer, example)


def test_the_model_identity_is_the_first_line_of_the_system_message(tokenizer: Any) -> None:
    (example,) = render(tokenizer, {"messages": [USER, ASSISTANT]}, model_identity="You are Ada.")
    expected = SYSTEM.replace("You are ChatGPT, a large language model trained by OpenAI.", "You are Ada.")
    assert prompt_of(tokenizer, example).startswith(expected)


def test_system_and_developer_message_are_joined_into_one(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "One."}, {"role": "developer", "content": "Two."}, USER, ASSISTANT]
    conversation = parse_conversation({"messages": messages})
    assert conversation.merged_instructions
    assert conversation.messages == [{"role": "developer", "content": "One.\n\nTwo."}, USER, ASSISTANT]
    (example,) = examples(conversation, rendering(tokenizer))
    assert prompt_of(tokenizer, example) == (
        f"{SYSTEM}<|start|>developer<|message|># Instructions\n\nOne.\n\nTwo.\n\n<|end|>"
        "<|start|>user<|message|>hi<|end|><|start|>assistant"
    )


def test_a_single_system_message_is_left_as_it_is() -> None:
    messages = [{"role": "system", "content": "reasoning language: French"}, USER, ASSISTANT]
    conversation = parse_conversation({"messages": messages})
    assert conversation.messages == messages
    assert not conversation.merged_instructions


@pytest.mark.parametrize("thinking", [None, ""])
def test_empty_thinking_leaves_no_empty_analysis_message(tokenizer: Any, thinking: str | None) -> None:
    row = {"messages": [{**USER, "thinking": None}, {**ASSISTANT, "thinking": thinking, "tool_calls": None}]}
    assert parse_conversation(row).messages == [USER, ASSISTANT]
    assert render(tokenizer, row) == render(tokenizer, {"messages": [USER, ASSISTANT]})


# --- refused rows ----------------------------------------------------------------------------------------------------


def bad(content: Any) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", "content": content}]


def calling(tool_calls: Any, **more: Any) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", "content": "", "tool_calls": tool_calls, **more}, ASSISTANT]


REFUSED_MESSAGES = {
    "not a list": ("hello", "'messages' is not a list"),
    "an object": ({"role": "user"}, "'messages' is not a list"),
    "empty": ([], "'messages' is not a list with at least one message"),
    "message is text": ([USER, "hello"], "messages[1] is a str, not an object"),
    "unknown role": ([USER, {"role": "bot", "content": "x"}], "messages[1] has the unknown role 'bot'"),
    "role is a list": ([USER, {"role": ["user"], "content": "x"}], "messages[1] has the unknown role"),
    "no role": ([{"content": "x"}, ASSISTANT], "messages[0] has the unknown role None"),
    "no assistant": ([USER], "has no assistant message"),
    "assistant first": ([ASSISTANT, USER], "begins with an assistant message"),
    "system in mid-conversation": (
        [USER, ASSISTANT, {"role": "system", "content": "x"}, ASSISTANT],
        "messages[2] is a system message in mid-conversation",
    ),
    "content is a number": (bad(3), "messages[1].content is int, not text"),
    "content is null": (bad(None), "messages[1].content is NoneType, not text"),
    "content is missing": ([USER, {"role": "assistant"}], "messages[1].content is NoneType, not text"),
    "thinking is a number": ([USER, {**ASSISTANT, "thinking": 5}], "messages[1].thinking is int, not text"),
    "thinking of a user": ([{**USER, "thinking": "hm"}, ASSISTANT], "messages[0] has 'thinking', but its role is"),
    "tool without a call": ([USER, TOOL, ASSISTANT], "without an earlier assistant message with 'tool_calls'"),
    "tool_calls of a user": (
        [{**USER, "tool_calls": [{"name": "add"}]}, ASSISTANT],
        "messages[0] has 'tool_calls', but its role is 'user'",
    ),
    "two tool calls": (calling([{"name": "add"}, {"name": "add"}]), "messages[1].tool_calls must be a list of exactly"),
    "tool_calls is text": (calling("add"), "messages[1].tool_calls must be a list of exactly one call"),
    "call without a name": (calling([{"arguments": "{}"}]), "messages[1].tool_calls[0] has no function name"),
    "call is text": (calling(["add"]), "messages[1].tool_calls[0] has no function name"),
    "arguments are not JSON": (
        calling([{"name": "add", "arguments": "{a: 1}"}]),
        "messages[1].tool_calls[0].arguments: not valid JSON",
    ),
}


@pytest.mark.parametrize(("messages", "reason"), REFUSED_MESSAGES.values(), ids=REFUSED_MESSAGES.keys())
def test_bad_messages_are_refused_with_the_reason(messages: Any, reason: str) -> None:
    assert reason in refusal({"messages": messages})


@pytest.mark.parametrize("token", SPECIAL_TOKENS.values())
@pytest.mark.parametrize("key", ["content", "thinking"])
def test_a_special_token_inside_text_is_refused(key: str, token: str) -> None:
    message = refusal({"messages": [USER, {**ASSISTANT, key: f"a{token}b"}]})
    assert message == f"messages[1].{key} contains the special token {token}, which would end the message"


INJECTED = {
    "arguments": {"messages": calling([{"name": "add", "arguments": {"a": "<|call|>"}}])},
    "arguments as JSON text": {"messages": calling([{"name": "add", "arguments": '{"a": "<|call|>"}'}])},
    "name of a called function": {"messages": calling([{"name": "add<|end|>", "arguments": {}}])},
    "description of a tool": {"messages": [USER, ASSISTANT], "tools": [{"name": "add", "description": "<|end|>"}]},
}


@pytest.mark.parametrize("row", INJECTED.values(), ids=INJECTED.keys())
def test_a_special_token_inside_a_tool_call_or_schema_is_refused(row: dict[str, Any]) -> None:
    assert "special token" in refusal(row)


@pytest.mark.parametrize("key", ["content", "thinking"])
def test_text_that_is_not_valid_unicode_is_refused(key: str) -> None:
    assert f"messages[1].{key}" in refusal({"messages": [USER, {**ASSISTANT, key: "\ud800"}]})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (None, "is a NoneType, not an object with 'messages'"),
        ([USER, ASSISTANT], "is a list, not an object with 'messages'"),
        ({}, "has no 'messages' (it has: nothing)"),
        ({"text": "x", "id": 3}, "has no 'messages' (it has: id, text)"),
        ({"messages": None}, "has no 'messages'"),
    ],
)
def test_a_row_that_is_not_a_conversation_is_refused(row: Any, reason: str) -> None:
    assert reason in refusal(row)


@pytest.mark.parametrize("effort", ["max", "", 3, ["low"]])
def test_an_unknown_reasoning_effort_is_refused(effort: Any) -> None:
    row = {"messages": [USER, ASSISTANT], "reasoning_effort": effort}
    assert refusal(row) == f"'reasoning_effort' is {effort!r}, not low, medium or high"


@pytest.mark.parametrize("language", ["", " ", 3, "French\nGerman"])
def test_an_invalid_reasoning_language_is_refused(language: Any) -> None:
    row = {"messages": [USER, ASSISTANT], "reasoning_language": language}
    assert refusal(row) == f"'reasoning_language' is {language!r}, not the name of a language"


def test_a_row_that_names_two_reasoning_languages_is_refused() -> None:
    row = {"messages": [STATED, USER, ASSISTANT], "reasoning_language": "German"}
    assert refusal(row) == (
        "'reasoning_language' is 'German', but its instructions begin with 'reasoning language: French'"
    )


def test_tool_arguments_of_a_type_that_json_lacks_are_refused() -> None:
    when = datetime.date(2025, 8, 5)
    messages = calling([{"name": "add", "arguments": {"when": when}}])
    assert refusal({"messages": messages}) == "messages[1].tool_calls[0] has a date, which is not a JSON type"


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("{", "'tools': not valid JSON"),
        (5, "'tools' is not a list of function schemas"),
        ({"name": "add"}, "'tools' is not a list of function schemas"),
        (["add"], "'tools' is not a list of function schemas"),
    ],
)
def test_bad_tool_schemas_are_refused(tools: Any, reason: str) -> None:
    assert reason in refusal({"messages": [USER, ASSISTANT], "tools": tools})


def test_a_tool_result_without_an_open_call_is_refused() -> None:
    row = {"messages": [QUESTION, CALL, TOOL, ASSISTANT, TOOL, ASSISTANT]}
    assert refusal(row) == "messages[4] is a tool message, but its call is already answered"


def test_content_and_thinking_of_a_call_are_refused_by_the_template(tokenizer: Any) -> None:
    row = {"messages": calling([{"name": "add"}], content="so", thinking="hm")}
    with pytest.raises(ConversationError, match="content and thinking"):
        render(tokenizer, row)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content }}",
        "<|start|>assistant{% if not add_generation_prompt %}{{ messages[-1].content }}<|end|>{% endif %}",
    ],
    ids=["another beginning", "another end"],
)
def test_a_chat_template_that_is_not_harmonys_is_refused(tokenizer: Any, template: str) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    with pytest.raises(ConversationError, match="chat template is not a Harmony template"):
        render(other, {"messages": [USER, ASSISTANT]})
