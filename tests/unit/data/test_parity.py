"""Our tokens equal the tokens of OpenAI's own renderer, openai-harmony, with the released vocabulary.

The chat template differs from openai-harmony in three places. `expected` reproduces two of them: a blank line after the
developer's text, and a tool's result as JSON text (in quotes). A separate test covers the third, a comma after the
default of a tool's parameter.
"""

import copy
import json
import os
from random import Random
from typing import Any

import openai_harmony as harmony
import pytest
from transformers import AutoTokenizer

from pipeline.config import TinyConfig
from pipeline.data.harmony import IGNORED, Rendering, examples
from pipeline.data.parsing import parse_conversation
from pipeline.models import tiny_model

if "TIKTOKEN_ENCODINGS_BASE" not in os.environ:
    pytest.skip("needs shared test data: openai-harmony's vocabulary", allow_module_level=True)

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
EFFORTS = {"low": "LOW", "medium": "MEDIUM", "high": "HIGH"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Looks outside.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where."},
                "unit": {"type": "string", "enum": ["celsius", "kelvin"]},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "description": "Tells the time.", "parameters": None}}
SYSTEM = {"role": "system", "content": "Sois bref — à l'année près.\n\nToujours."}
QUESTION = {"role": "user", "content": "What's 12 + 7?  (in\n\twords: 数字) 🙂"}
ANSWER = {"role": "assistant", "thinking": "12 + 7 = 19, je crois.", "content": "Dix-neuf.\n\n```py\n12+7\n```"}
CALL = {
    "role": "assistant",
    "thinking": "I have to look.",
    "content": None,
    "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Zürich", "days": [1, 2]}'}}],
}
SECOND_CALL = {"role": "assistant", "tool_calls": [{"name": "now", "arguments": {}}]}
TOOL = {"role": "tool", "content": "dry, 20 °C"}
THANKS = {"role": "user", "content": "Thanks. And now?"}

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [QUESTION, ANSWER]},
    "no reasoning": {"messages": [QUESTION, {"role": "assistant", "content": "19"}]},
    "instructions": {"messages": [SYSTEM, QUESTION, ANSWER]},
    "three turns": {"messages": [SYSTEM, QUESTION, ANSWER, THANKS, ANSWER, QUESTION, ANSWER]},
    "low effort": {"messages": [QUESTION, ANSWER], "reasoning_effort": "low"},
    "high effort": {"messages": [QUESTION, ANSWER], "reasoning_effort": "high"},
    "reasoning language": {"messages": [SYSTEM, QUESTION, ANSWER], "reasoning_language": "French"},
    "reasoning language alone": {"messages": [QUESTION, ANSWER], "reasoning_language": "German"},
    "tools": {"messages": [SYSTEM, QUESTION, CALL, TOOL, ANSWER], "tools": [WEATHER, NOW]},
    "tools without instructions": {"messages": [QUESTION, CALL, TOOL, ANSWER], "tools": [WEATHER]},
    "two calls": {"messages": [QUESTION, CALL, TOOL, SECOND_CALL, TOOL, ANSWER], "tools": [WEATHER, NOW]},
    "tools, then more turns": {
        "messages": [SYSTEM, QUESTION, CALL, TOOL, ANSWER, THANKS, CALL, TOOL, ANSWER],
        "tools": [WEATHER, NOW],
    },
}


@pytest.fixture(scope="module")
def encoding() -> Any:
    return harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.fixture(scope="module")
def tokenizer(encoding: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer with the chat template and the vocabulary of the released models."""
    directory = tmp_path_factory.mktemp("tokenizer") / "tiny"
    tiny_model.create_tiny(directory, TinyConfig())
    template = AutoTokenizer.from_pretrained(directory)

    class Released:
        chat_template = template.chat_template
        apply_chat_template = staticmethod(template.apply_chat_template)

        def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
            assert not add_special_tokens
            return {"input_ids": [encoding.encode(text, allowed_special="all") for text in texts]}

    return Released()


def expected(encoding: Any, row: dict[str, Any], identity: str = IDENTITY) -> list[dict[str, list[int]]]:
    """Render every assistant turn of a row with openai-harmony. Only the completion is supervised."""
    made = []
    messages = [_normalize_calls(message) for message in row["messages"]]
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = _render(encoding, _opening(row, identity) + _history(messages[:i]))
            prompt += encoding.encode("<|start|>assistant", allowed_special="all")
            completion = _completion(encoding, message)
            made.append({"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion})
    return made


def _normalize_calls(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with flat tool calls, whose arguments are JSON text."""
    message = copy.deepcopy(message)
    for call in message.get("tool_calls", []):
        call |= call.pop("function", {})
        arguments = call["arguments"]
        # The template writes the arguments as JSON without ASCII escapes. Harmony does not change the text that it
        # gets.
        call["arguments"] = json.dumps(
            json.loads(arguments) if isinstance(arguments, str) else arguments, ensure_ascii=False
        )
    return message


def _opening(row: dict[str, Any], identity: str) -> list[Any]:
    effort = getattr(harmony.ReasoningEffort, EFFORTS[row.get("reasoning_effort", "medium")])
    system = (
        harmony.SystemContent.new()
        .with_model_identity(identity)
        .with_reasoning_effort(effort)
        .with_conversation_start_date("2025-08-05")
    )
    opening = [harmony.Message.from_role_and_content(harmony.Role.SYSTEM, system)]
    language = [f"reasoning language: {row['reasoning_language']}"] if "reasoning_language" in row else []
    instructions = [message["content"] for message in row["messages"] if message["role"] == "system"]
    text = "\n\n".join(language + instructions)
    developer = harmony.DeveloperContent.new()
    if text:
        developer = developer.with_instructions(text + "\n\n" * ("tools" not in row))
    if "tools" in row:
        described = [
            harmony.ToolDescription.new(tool["name"], tool["description"], parameters=tool["parameters"])
            for tool in (tool["function"] for tool in row["tools"])
        ]
        developer = developer.with_function_tools(described)
    if text or "tools" in row:
        opening.append(harmony.Message.from_role_and_content(harmony.Role.DEVELOPER, developer))
    return opening


def _history(messages: list[dict[str, Any]]) -> list[Any]:
    """Render earlier messages. Reasoning before the latest final answer is dropped."""
    finals = [i for i, m in enumerate(messages) if m["role"] == "assistant" and "tool_calls" not in m]
    answered = finals[-1] if finals else -1
    history: list[Any] = []
    called = ""
    for i, message in enumerate(messages):
        if message["role"] == "user":
            history.append(harmony.Message.from_role_and_content(harmony.Role.USER, message["content"]))
        elif message["role"] == "tool":
            author = harmony.Author.new(harmony.Role.TOOL, f"functions.{called}")
            # The template writes a tool's result as JSON text.
            result = harmony.Message.from_author_and_content(author, json.dumps(message["content"], ensure_ascii=False))
            history.append(result.with_channel("commentary").with_recipient("assistant"))
        elif message["role"] == "assistant":
            history += _assistant(message, with_reasoning=i > answered)
            called = message["tool_calls"][0]["name"] if "tool_calls" in message else called
    return history


def _assistant(message: dict[str, Any], with_reasoning: bool) -> list[Any]:
    made = []
    if message.get("thinking") and with_reasoning:
        made.append(_said(message["thinking"]).with_channel("analysis"))
    if "tool_calls" not in message:
        return [*made, _said(message["content"]).with_channel("final")]
    call = message["tool_calls"][0]
    said = _said(call["arguments"]).with_channel("commentary").with_recipient(f"functions.{call['name']}")
    return [*made, said.with_content_type("json")]


def _said(text: str) -> Any:
    return harmony.Message.from_role_and_content(harmony.Role.ASSISTANT, text)


def _completion(encoding: Any, message: dict[str, Any]) -> list[int]:
    start = encoding.encode("<|start|>assistant", allowed_special="all")
    ids = [token for said in _assistant(message, with_reasoning=True) for token in encoding.render(said)]
    assert ids[: len(start)] == start
    if "tool_calls" not in message:  # <|return|> ends a supervised final answer
        ids[-1:] = encoding.encode("<|return|>", allowed_special="all")
    return ids[len(start) :]


def _render(encoding: Any, messages: list[Any]) -> list[int]:
    # By default harmony drops the reasoning, even the reasoning of unanswered tool calls.
    keep = harmony.RenderConversationConfig(auto_drop_analysis=False)
    return encoding.render_conversation(harmony.Conversation.from_messages(messages), config=keep)


@pytest.mark.parametrize("row", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_every_turn_has_the_tokens_of_openai_harmony(row: dict[str, Any], encoding: Any, tokenizer: Any) -> None:
    made = examples(parse_conversation(row), Rendering(tokenizer, "medium", "2025-08-05", True, form="template"))
    wanted = expected(encoding, row)
    for ours, theirs in zip(made, wanted, strict=True):
        assert encoding.decode(ours["input_ids"]) == encoding.decode(theirs["input_ids"])
        assert ours == theirs


def test_the_template_writes_a_comma_after_a_parameters_default_unlike_openai_harmony(
    encoding: Any, tokenizer: Any
) -> None:
    row = copy.deepcopy(CONVERSATIONS["tools without instructions"])
    row["tools"][0]["function"]["parameters"]["properties"]["hours"] = {"type": "integer", "default": 24}
    made = examples(parse_conversation(row), Rendering(tokenizer, "medium", "2025-08-05", True, form="template"))
    for ours, theirs in zip(made, expected(encoding, row), strict=True):
        text = encoding.decode(ours["input_ids"])
        assert text.count("// default: 24,\n") == 1
        assert text.replace("// default: 24,\n", "// default: 24\n") == encoding.decode(theirs["input_ids"])


def test_another_identity_has_the_tokens_of_openai_harmony(encoding: Any, tokenizer: Any) -> None:
    rendering = Rendering(tokenizer, "medium", "2025-08-05", True, model_identity="You are Ada.", form="template")
    row = CONVERSATIONS["three turns"]
    assert examples(parse_conversation(row), rendering) == expected(encoding, row, "You are Ada.")


# --- data.rendering=harmony: openai-harmony's own rendering, without any adaptation -----------------------------------

TEXTS = [
    "",
    "x",
    " leading",
    "trailing ",
    "\n\n",
    "日本語 ü",
    'a "quoted" {"json": 1}',
    "12345 67.8",
    "functions.add to=me",
    "🙂‍↔️",
]


def random_conversation(seed: int) -> dict[str, Any]:
    """Make a row with several turns. Each may have reasoning, calls with results, and text before the call."""
    random = Random(seed)

    def text() -> str:
        return " ".join(random.choices(TEXTS, k=random.randrange(1, 4))) or "x"

    messages = [{"role": random.choice(["system", "developer"]), "content": text()}] if random.random() < 0.6 else []
    for turn in range(random.randrange(1, 5)):
        messages.append({"role": "user", "content": text()})
        for call in range(random.choice([0, 0, 1, 2])):
            arguments = {"city": text(), "days": [1, None, 2.5, {"a": True}]}
            function = {"name": random.choice(["weather", "now"]), "arguments": arguments}
            message = {"role": "assistant", "content": random.choice(["", text()])}
            message |= {"tool_calls": [{"id": f"{turn}.{call}", "function": function}]}
            message |= {"thinking": text()} if random.random() < 0.6 else {}
            messages += [message, {"role": "tool", "tool_call_id": f"{turn}.{call}", "content": text()}]
        messages.append({"role": "assistant", "content": text()})
        if random.random() < 0.6:
            messages[-1]["thinking"] = text()
    return {"messages": messages, "tools": random.choice([None, [WEATHER], [WEATHER, NOW]])}


def by_openai_harmony(encoding: Any, row: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Render every assistant turn with openai-harmony. Reasoning before the last answer is left out, as engines do."""
    made = []
    for i, message in enumerate(row["messages"]):
        if message["role"] != "assistant":
            continue
        finals = [at for at, m in enumerate(row["messages"][:i]) if m["role"] == "assistant" and "tool_calls" not in m]
        history = _messages(row["messages"][:i], reasoning_after=max(finals, default=-1))
        prompt = _render(encoding, [*_head(row), *history]) + encoding.encode(
            "<|start|>assistant", allowed_special="all"
        )
        config = harmony.RenderConversationConfig(auto_drop_analysis=False)
        alone = harmony.Conversation.from_messages(_messages([message], reasoning_after=-1))
        completion = encoding.render_conversation_for_training(alone, config=config)[2:]  # without <|start|>assistant
        made.append({"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion})
    return made


def _head(row: dict[str, Any]) -> list[Any]:
    system = harmony.SystemContent.new().with_reasoning_effort(harmony.ReasoningEffort.MEDIUM)
    system = system.with_conversation_start_date("2025-08-05")
    developer = harmony.DeveloperContent.new()
    if row["messages"][0]["role"] in ("system", "developer"):
        developer = developer.with_instructions(row["messages"][0]["content"])
    if row["tools"]:
        functions = [tool["function"] for tool in row["tools"]]
        developer = developer.with_function_tools(
            [harmony.ToolDescription.new(f["name"], f["description"], parameters=f["parameters"]) for f in functions]
        )
    head = [harmony.Message.from_role_and_content(harmony.Role.SYSTEM, system)]
    has_developer = row["messages"][0]["role"] in ("system", "developer") or row["tools"]
    return [*head, harmony.Message.from_role_and_content(harmony.Role.DEVELOPER, developer)] if has_developer else head


def _messages(messages: list[dict[str, Any]], reasoning_after: int) -> list[Any]:
    made, called = [], ""
    for i, message in enumerate(messages):
        if message["role"] == "user":
            made.append(harmony.Message.from_role_and_content(harmony.Role.USER, message["content"]))
        elif message["role"] == "tool":
            author = harmony.Author.new(harmony.Role.TOOL, f"functions.{called}")
            result = harmony.Message.from_author_and_content(author, message["content"])
            made.append(result.with_channel("commentary").with_recipient("assistant"))
        elif message["role"] == "assistant":
            if message.get("thinking") and i > reasoning_after:
                made.append(_said(message["thinking"]).with_channel("analysis"))
            if "tool_calls" not in message:
                made.append(_said(message["content"]).with_channel("final"))
                continue
            if message["content"]:
                made.append(_said(message["content"]).with_channel("commentary"))
            function = message["tool_calls"][0]["function"]
            call = _said(json.dumps(function["arguments"], ensure_ascii=False)).with_channel("commentary")
            called = function["name"]
            made.append(call.with_recipient(f"functions.{called}").with_content_type("<|constrain|>json"))
    return made


def test_random_conversations_have_the_tokens_of_openai_harmony(encoding: Any, tokenizer: Any) -> None:
    for seed in range(60):
        row = random_conversation(seed)
        made = examples(parse_conversation(row), Rendering(tokenizer, "medium", "2025-08-05", True))
        assert made == by_openai_harmony(encoding, row), seed


def test_openai_harmony_itself_drops_the_reasoning_of_the_turn_before_as_we_do(encoding: Any, tokenizer: Any) -> None:
    row = {"messages": [SYSTEM, QUESTION, ANSWER, THANKS, ANSWER], "tools": None}
    _, second = examples(parse_conversation(row), Rendering(tokenizer, "medium", "2025-08-05", True))
    conversation = harmony.Conversation.from_messages(
        [*_head(row), *_messages(row["messages"][:4], reasoning_after=-1)]
    )
    prompt = encoding.render_conversation_for_completion(conversation, harmony.Role.ASSISTANT)
    assert second["input_ids"][: len(prompt)] == prompt
