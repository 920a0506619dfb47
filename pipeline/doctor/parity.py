"""Check token parity: compare our tokens with openai-harmony's. Inference engines use openai-harmony.

The tokens of a turn must be those that `render_conversation` gives for the prompt, and for the completion. Reasoning
before the last answer of a prompt is left out, as engines do. openai-harmony itself leaves out only the reasoning
before the first answer.

With data.rendering=template, three parts are known to differ. The chat template writes a blank line after the
developer's text, tool results as JSON strings, and `json` instead of `<|constrain|>json` in calls. So this module
passes these parts to openai-harmony in the form that the template writes.

The check needs the package openai-harmony, and its vocabulary on disk. It never downloads the vocabulary.
"""

import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from pipeline.checkpoints.gpt_oss import SPECIAL_TOKENS
from pipeline.config import RenderingForm
from pipeline.data import harmony
from pipeline.data.conversations import INSTRUCTIONS, Conversation, Message, Tool, add_language, is_final, is_trained
from pipeline.data.harmony import Rendering
from pipeline.data.harmony_text import CALL_TYPE
from pipeline.data.tokenizers import Tokenizer
from pipeline.doctor.rows import Row
from pipeline.runs.console import progress

if TYPE_CHECKING:
    import openai_harmony

_VOCABULARY = "o200k_base.tiktoken"
_URL = f"https://openaipublic.blob.core.windows.net/encodings/{_VOCABULARY}"
_CONTEXT_TOKENS = 4
_MOST_TURNS = 8  # of one conversation: the prompts of its turns repeat each other


class Difference(TypedDict):
    """The first differing token: the example's place, the token's position in the example, and both texts around it."""

    where: str
    position: int
    ours: str
    theirs: str


class _Outcome(TypedDict):
    is_checked: bool


class ParityFigures(_Outcome, total=False):
    """Number of examples, how many of them differ, and the first difference.

    If no tokens were compared, only `is_checked` and `reason` are set.
    """

    reason: str
    examples: int
    differ: int
    first: Difference | None


def figures(rows: list[Row], how: Rendering) -> ParityFigures:
    """Compare the tokens of all examples with openai-harmony's, if it is available."""
    reason = _reason_unavailable() or _reason_incomparable(how.tokenizer)
    if reason is not None:
        return {"is_checked": False, "reason": reason}
    oracle = _Oracle(how)
    compared, differing = 0, 0
    first: Difference | None = None
    for row in progress(rows, what="token parity", unit="row"):
        script = harmony.render(row.conversation, how)
        (ours,) = harmony.tokenize([replace(script, turns=script.turns[-_MOST_TURNS:])], how.tokenizer)
        mine_of = [example.input_ids for example in ours]
        for mine, theirs in zip(mine_of, oracle.examples(row.conversation), strict=True):
            compared += 1
            differing += mine != theirs
            if mine != theirs and first is None:
                first = _difference(row.conversation.where, mine, theirs, how.tokenizer)
    return {"is_checked": True, "examples": compared, "differ": differing, "first": first}


def _reason_unavailable() -> str | None:
    """Return why openai-harmony cannot be used, or None if it can."""
    if importlib.util.find_spec("openai_harmony") is None:
        return "the package openai-harmony is not installed"
    base = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
    cache = Path(os.environ.get("TIKTOKEN_RS_CACHE_DIR") or Path(tempfile.gettempdir()) / "tiktoken-rs-cache")
    path = Path(base) / _VOCABULARY if base else cache / hashlib.sha1(_URL.encode()).hexdigest()
    if not path.is_file():
        return f"openai-harmony has no vocabulary: {path} is missing. Set TIKTOKEN_ENCODINGS_BASE to its folder"
    return None


def _reason_incomparable(tokenizer: Tokenizer) -> str | None:
    """Return why a tokenizer cannot agree with openai-harmony, or None if it can.

    For example, the tokenizer of the tiny model has another vocabulary.
    """
    others = [token for i, token in SPECIAL_TOKENS.items() if tokenizer.convert_tokens_to_ids(token) != i]
    if others:
        found = tokenizer.convert_tokens_to_ids(others[0])
        return f"the tokenizer is not the released models' tokenizer ({others[0]} is {found})"
    return None


def _difference(where: str, ours: list[int], theirs: list[int], tokenizer: Tokenizer) -> Difference:
    """Find the first token that differs, and decode the tokens around it."""
    same = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if len(set(pair)) > 1), None)
    position = min(len(ours), len(theirs)) if same is None else same
    around = slice(max(0, position - _CONTEXT_TOKENS), position + _CONTEXT_TOKENS)
    return {
        "where": where,
        "position": position,
        "ours": tokenizer.decode(ours[around]),
        "theirs": tokenizer.decode(theirs[around]),
    }


class _Oracle:
    """Renders our conversations with openai-harmony."""

    def __init__(self, how: Rendering) -> None:
        import openai_harmony

        self._harmony = openai_harmony
        self._encoding = openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
        self._opening = len(self._encoding.encode("<|start|>assistant", allowed_special="all"))
        self._how = how
        self._by_template = how.form == RenderingForm.template.name

    def examples(self, conversation: Conversation) -> Iterator[list[int]]:
        """Yield the token ids of the last examples of a conversation, in the same order as `harmony.render`."""
        h = self._harmony
        turns = [i for i, message in enumerate(conversation.messages) if is_trained(message)]
        keep_all = h.RenderConversationConfig(auto_drop_analysis=False)
        for turn in turns[-_MOST_TURNS:] if self._how.every_turn else turns[-1:]:
            history = conversation.messages[:turn]
            answered = max((i for i, message in enumerate(history) if is_final(message)), default=-1)
            past = [message for message in self._messages(history[: answered + 1]) if message.channel != "analysis"]
            before = [*self._instructions(conversation), *past]
            before += self._messages(conversation.messages[:turn])[len(self._messages(history[: answered + 1])) :]
            prompt = self._encoding.render_conversation_for_completion(
                h.Conversation.from_messages(before), h.Role.ASSISTANT, keep_all
            )
            answer = h.Conversation.from_messages(self._messages(conversation.messages[turn : turn + 1]))
            completion = self._encoding.render_conversation_for_training(answer, keep_all)
            yield prompt + completion[self._opening :]

    def _instructions(self, conversation: Conversation) -> "list[openai_harmony.Message]":
        h = self._harmony
        effort = (conversation.reasoning_effort or self._how.reasoning_effort).capitalize()
        system = h.SystemContent.new().with_reasoning_effort(h.ReasoningEffort(effort))
        system = system.with_conversation_start_date(self._how.conversation_date)
        if self._how.model_identity is not None:
            system = system.with_model_identity(self._how.model_identity)
        messages = [h.Message.from_role_and_content(h.Role.SYSTEM, system)]
        language = conversation.reasoning_language or self._how.reasoning_language
        first = add_language(conversation.messages, language)[0]
        text = first["content"] if first["role"] in INSTRUCTIONS else ""
        if text or conversation.tools:
            developer = h.DeveloperContent.new()
            if text:
                developer = developer.with_instructions(
                    text if conversation.tools or not self._by_template else f"{text}\n\n"
                )
            if conversation.tools:
                developer = developer.with_function_tools(list(map(self._tool, conversation.tools)))
            messages.append(h.Message.from_role_and_content(h.Role.DEVELOPER, developer))
        return messages

    def _tool(self, tool: Tool) -> "openai_harmony.ToolDescription":
        function = tool["function"]
        return self._harmony.ToolDescription.new(
            function["name"], function["description"], parameters=function.get("parameters")
        )

    def _messages(self, messages: Sequence[Message]) -> "list[openai_harmony.Message]":
        h = self._harmony
        made, called = [], ""
        for message in messages:
            if message["role"] == "user":
                made.append(h.Message.from_role_and_content(h.Role.USER, message["content"]))
            elif message["role"] == "tool":
                author = h.Author.new(h.Role.TOOL, f"functions.{message.get('name', called)}")
                text = message["content"]
                result = json.dumps(text, ensure_ascii=False) if self._by_template else text
                made.append(h.Message.from_author_and_content(author, result).with_recipient("assistant"))
                made[-1] = made[-1].with_channel("commentary")
            elif message["role"] == "assistant":
                made += self._turn(message)
                called = message["tool_calls"][0]["function"]["name"] if "tool_calls" in message else called
        return made

    def _turn(self, message: Message) -> "list[openai_harmony.Message]":
        """Convert an assistant turn. Its reasoning, if it has any, comes before its answer or its call."""

        def say(channel: str, text: str) -> "openai_harmony.Message":
            return self._harmony.Message.from_role_and_content(self._harmony.Role.ASSISTANT, text).with_channel(channel)

        calls = message.get("tool_calls", [])
        thinking, preamble = message.get("thinking", ""), message["content"] if calls else message.get("preamble", "")
        if calls and self._by_template:  # the template takes text before a call as its reasoning
            thinking, preamble = thinking or preamble, ""
        before = [say("analysis", thinking)] if thinking else []
        before += [say("commentary", preamble)] if preamble else []
        if not calls:
            return [*before, say("final", message["content"])]
        function = calls[0]["function"]
        call = say("commentary", json.dumps(function["arguments"], ensure_ascii=False))
        call = call.with_content_type("json" if self._by_template else CALL_TYPE)
        return [*before, call.with_recipient(f"functions.{function['name']}")]
