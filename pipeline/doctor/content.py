"""What stands in the rows: reasoning, tools, control tokens written as text, copies, languages."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from pipeline.data.harmony import Conversation, Message, ToolCall
from pipeline.data.languages import Languages
from pipeline.doctor.rows import Row, first

_CONTROL = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?(?:think|thinking|reasoning|analysis)>|\[/?INST\]|<</?SYS>>")
"""Control tokens of Harmony and of other chat formats, and the tags that others put around reasoning."""


def reasoning(rows: list[Row]) -> dict[str, Any]:
    """Assistant turns with and without reasoning; that of a tool call may stand in its content."""
    without = [(row, turn) for row in rows for turn in _assistant(row.conversation) if not _reasoning(turn)]
    lacking = first(row for row in rows if not all(map(_reasoning, _assistant(row.conversation))))
    return {
        "turns": sum(1 for row in rows for _ in _assistant(row.conversation)),
        "turns_without": len(without),
        "rows_without": sum(not any(map(_reasoning, _assistant(row.conversation))) for row in rows),
        "first": lacking,
    }


def efforts(rows: list[Row], default: str) -> dict[str, int]:
    """Rows by reasoning effort; those that name none have `default`."""
    found = Counter(row.conversation.reasoning_effort or default for row in rows)
    return {name: found[name] for name in ("low", "medium", "high")}


def tools(rows: list[Row]) -> dict[str, Any]:
    """How many rows offer tools and use them, and which are called."""
    called: Counter[str] = Counter()
    for row in rows:
        called.update(call["function"]["name"] for turn in row.conversation.messages for call in _calls(turn))
    return {
        "rows_that_offer": sum(row.conversation.tools is not None for row in rows),
        "rows_that_call": sum(any(map(_calls, row.conversation.messages)) for row in rows),
        "calls": called.total(),
        "results": sum(turn["role"] == "tool" for row in rows for turn in row.conversation.messages),
        "by_name": dict(called.most_common()),
    }


def control_text(rows: list[Row]) -> dict[str, Any]:
    """Text that looks like a control token, and is learnt as text. (Harmony's own are refused when rows are read.)"""
    found: Counter[str] = Counter()
    ill = []
    for row in rows:
        matches = sorted(set(_CONTROL.findall("\n".join(_texts(row.conversation)))))
        found.update(matches)
        if matches:
            ill.append(row)
    return {"rows": len(ill), "rows_by_token": dict(found.most_common()), "first": first(ill)}


def copies(rows: list[Row]) -> dict[str, Any]:
    """Rows that repeat an earlier one word for word, and rows that repeat only its prompt."""
    seen: set[str] = set()
    prompts: set[str] = set()
    again, other_answer = [], 0
    for row in rows:
        conversation = row.conversation
        key = json.dumps([conversation.messages, conversation.tools, conversation.reasoning_effort], sort_keys=True)
        asked = json.dumps(prompt(conversation), sort_keys=True)
        if key in seen:
            again.append(row)
        elif asked in prompts:
            other_answer += 1
        seen.add(key)
        prompts.add(asked)
    return {"rows": len(again), "first": first(again), "same_prompt_other_answer": other_answer}


def languages(rows: list[Row], tell: Languages) -> dict[str, dict[str, int]]:
    """Rows by the language of what is asked, of the reasoning and of the answers."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for kind, texts in _by_kind(row.conversation).items():
            if texts:
                found[kind][tell.of("\n".join(texts))] += 1
    return {kind: dict(found[kind].most_common()) for kind in ("prompts", "reasoning", "answers")}


def prompt(conversation: Conversation) -> list[Message]:
    """The messages before the first answer."""
    roles = [message["role"] for message in conversation.messages]
    return conversation.messages[: roles.index("assistant")]


def _by_kind(conversation: Conversation) -> dict[str, list[str]]:
    turns = list(_assistant(conversation))
    return {
        "prompts": [message["content"] for message in conversation.messages if message["role"] == "user"],
        "reasoning": [_reasoning(turn) for turn in turns if _reasoning(turn)],
        "answers": [turn["content"] for turn in turns if not _calls(turn)],
    }


def _assistant(conversation: Conversation) -> Iterator[Message]:
    return (message for message in conversation.messages if message["role"] == "assistant")


def _calls(message: Message) -> list[ToolCall]:
    return message.get("tool_calls", [])


def _reasoning(turn: Message) -> str:
    return turn.get("thinking", "") or (turn["content"] if _calls(turn) else "")


def _texts(conversation: Conversation) -> Iterator[str]:
    for message in conversation.messages:
        yield message["content"]
        yield message.get("thinking", "")
        yield json.dumps(_calls(message), ensure_ascii=False)
