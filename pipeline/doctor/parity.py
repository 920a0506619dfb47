"""Whether our tokens are those of openai-harmony, which inference engines render with.

An example's prompt is held against what harmony renders for completion, which drops earlier reasoning by itself, and
its completion against what it renders for training. Three habits of the chat template are handed to harmony, since they
are what the released model's template does and no mistakes of tokenization: a blank line after the developer's text,
the results of tools as JSON strings, and calls marked `json` rather than `<|constrain|>json`.

The check runs where the package is installed and has its vocabulary on disk; it never fetches it.
"""

import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.checkpoints.gpt_oss import SPECIAL_TOKENS
from pipeline.data.harmony import Conversation, Message, Rendering, add_language, examples
from pipeline.doctor.rows import Row
from pipeline.runs.console import progress

_VOCABULARY = "o200k_base.tiktoken"
_URL = f"https://openaipublic.blob.core.windows.net/encodings/{_VOCABULARY}"
_CONTEXT_TOKENS = 4


def figures(rows: list[Row], how: Rendering) -> dict[str, Any]:
    """How many examples differ, and the first that does; or why that was not checked."""
    reason = _unavailable() or _other_vocabulary(how.tokenizer)
    if reason is not None:
        return {"is_checked": False, "reason": reason}
    oracle = _Oracle(how)
    compared, differing, shown = 0, 0, None
    for row in progress(rows, what="token parity", unit="row"):
        ours = [example["input_ids"] for example in examples(row.conversation, how)]
        for mine, theirs in zip(ours, oracle.examples(row.conversation), strict=True):
            compared += 1
            differing += mine != theirs
            if mine != theirs and shown is None:
                shown = {"where": row.conversation.where, **_difference(mine, theirs, how.tokenizer)}
    return {"is_checked": True, "examples": compared, "differ": differing, "first": shown}


def _unavailable() -> str | None:
    if importlib.util.find_spec("openai_harmony") is None:
        return "the package openai-harmony is not installed"
    base = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
    cache = Path(os.environ.get("TIKTOKEN_RS_CACHE_DIR") or Path(tempfile.gettempdir()) / "tiktoken-rs-cache")
    path = Path(base) / _VOCABULARY if base else cache / hashlib.sha1(_URL.encode()).hexdigest()
    if not path.is_file():
        return f"openai-harmony has no vocabulary: {path} is missing; set TIKTOKEN_ENCODINGS_BASE to the folder of it"
    return None


def _other_vocabulary(tokenizer: Any) -> str | None:
    """A tokenizer of its own, like the synthetic model's, has nothing to agree with."""
    others = [token for i, token in SPECIAL_TOKENS.items() if tokenizer.convert_tokens_to_ids(token) != i]
    if others:
        found = tokenizer.convert_tokens_to_ids(others[0])
        return f"the tokenizer is not that of the released models ({others[0]} is {found})"
    return None


def _difference(ours: list[int], theirs: list[int], tokenizer: Any) -> dict[str, Any]:
    """The first token that differs, and what stands around it."""
    same = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if len(set(pair)) > 1), None)
    position = min(len(ours), len(theirs)) if same is None else same
    around = slice(max(0, position - _CONTEXT_TOKENS), position + _CONTEXT_TOKENS)
    return {
        "position": position,
        "ours": tokenizer.decode(ours[around]),
        "theirs": tokenizer.decode(theirs[around]),
    }


class _Oracle:
    """openai-harmony, given our conversations."""

    def __init__(self, how: Rendering) -> None:
        import openai_harmony

        self._harmony = openai_harmony
        self._encoding = openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
        self._opening = len(self._encoding.encode("<|start|>assistant", allowed_special="all"))
        self._how = how

    def examples(self, conversation: Conversation) -> Iterator[list[int]]:
        """The ids of each example, in the order of harmony.examples."""
        h = self._harmony
        turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        keep_all = h.RenderConversationConfig(auto_drop_analysis=False)
        for turn in turns if self._how.every_turn else turns[-1:]:
            before = [*self._instructions(conversation), *self._messages(conversation.messages[:turn])]
            prompt = self._encoding.render_conversation_for_completion(
                h.Conversation.from_messages(before), h.Role.ASSISTANT
            )
            answer = h.Conversation.from_messages(self._messages(conversation.messages[turn : turn + 1]))
            completion = self._encoding.render_conversation_for_training(answer, keep_all)
            yield prompt + completion[self._opening :]

    def _instructions(self, conversation: Conversation) -> list[Any]:
        h = self._harmony
        effort = (conversation.reasoning_effort or self._how.reasoning_effort).capitalize()
        system = h.SystemContent.new().with_reasoning_effort(h.ReasoningEffort(effort))
        system = system.with_conversation_start_date(self._how.conversation_date)
        if self._how.model_identity is not None:
            system = system.with_model_identity(self._how.model_identity)
        messages = [h.Message.from_role_and_content(h.Role.SYSTEM, system)]
        language = conversation.reasoning_language or self._how.reasoning_language
        first = add_language(conversation.messages, language)[0]
        text = first["content"] if first["role"] in ("system", "developer") else ""
        if text or conversation.tools:
            developer = h.DeveloperContent.new()
            if text:
                developer = developer.with_instructions(text if conversation.tools else f"{text}\n\n")
            if conversation.tools:
                developer = developer.with_function_tools(list(map(self._tool, conversation.tools)))
            messages.append(h.Message.from_role_and_content(h.Role.DEVELOPER, developer))
        return messages

    def _tool(self, tool: dict[str, Any]) -> Any:
        function = tool["function"]
        return self._harmony.ToolDescription.new(
            function["name"], function["description"], parameters=function.get("parameters")
        )

    def _messages(self, messages: list[Message]) -> list[Any]:
        h = self._harmony
        made, called = [], ""
        for message in messages:
            if message["role"] == "user":
                made.append(h.Message.from_role_and_content(h.Role.USER, message["content"]))
            elif message["role"] == "tool":
                author = h.Author.new(h.Role.TOOL, called)
                result = json.dumps(message["content"], ensure_ascii=False)
                made.append(h.Message.from_author_and_content(author, result).with_recipient("assistant"))
                made[-1] = made[-1].with_channel("commentary")
            elif message["role"] == "assistant":
                made += self._turn(message)
                called = made[-1].recipient or called
        return made

    def _turn(self, message: Message) -> list[Any]:
        """The reasoning, and the answer or the call."""

        def say(channel: str, text: str) -> Any:
            return self._harmony.Message.from_role_and_content(self._harmony.Role.ASSISTANT, text).with_channel(channel)

        calls = message.get("tool_calls")
        thinking = message.get("thinking") or (message["content"] if calls else "")
        reasoning = [say("analysis", thinking)] if thinking else []
        if not calls:
            return [*reasoning, say("final", message["content"])]
        function = calls[0]["function"]
        call = say("commentary", json.dumps(function["arguments"], ensure_ascii=False))
        return [*reasoning, call.with_recipient(f"functions.{function['name']}").with_content_type("json")]
