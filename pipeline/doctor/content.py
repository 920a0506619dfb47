"""Describe the content of the rows: reasoning, tools, control tokens written as text, copies and languages."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import TypedDict

from pipeline.config import RenderingForm
from pipeline.data.control_text import find_control_text
from pipeline.data.conversations import Conversation, Message, ToolCall, is_final, is_trained
from pipeline.data.harmony import Rendering
from pipeline.data.languages import Languages
from pipeline.data.prompts import prompt
from pipeline.doctor.rows import Row, first


class ReasoningFigures(TypedDict):
    """How often reasoning is missing: all assistant turns, turns without reasoning, and rows without any reasoning."""

    turns: int
    turns_without: int
    rows_without: int
    first: list[str]


class UntrainedFigures(TypedDict):
    """How many assistant turns have the weight 0, and in how many rows. They are context, and are not trained."""

    turns: int
    rows: int


class ToolFigures(TypedDict):
    """How often tools are offered and called. `by_name` has the number of calls of each tool."""

    rows_that_offer: int
    rows_that_call: int
    calls: int
    results: int
    by_name: dict[str, int]


class UnofferedFigures(TypedDict):
    """Calls of functions that their row does not offer, in how many rows, and the number of calls of each function."""

    calls: int
    rows: int
    by_name: dict[str, int]
    first: list[str]


class EmptyAnswerFigures(TypedDict):
    """How many trained answers have no text, and in how many rows. A tool call is not an answer."""

    turns: int
    rows: int
    first: list[str]


class UnansweredFigures(TypedDict):
    """How many rows end with a message of the user or of a tool. Nothing answers it, so it is not used."""

    rows: int
    first: list[str]


class ControlTextFigures(TypedDict):
    """How many rows have text that looks like a control token, and how many rows have each of these tokens."""

    rows: int
    rows_by_token: dict[str, int]
    first: list[str]


class CopyFigures(TypedDict):
    """Number of rows that repeat an earlier row. Rows that repeat only its prompt are counted separately."""

    rows: int
    first: list[str]
    same_prompt_other_answer: int


def reasoning(rows: list[Row], how: Rendering) -> ReasoningFigures:
    """Count the trained turns with and without reasoning.

    The chat template writes text before a call as reasoning.
    """
    found = [[bool(_reasoning(turn, how)) for turn in _trained_turns(row.conversation)] for row in rows]
    return {
        "turns": sum(map(len, found)),
        "turns_without": sum(not has for turns in found for has in turns),
        "rows_without": sum(not any(turns) for turns in found),
        "first": first(row for row, turns in zip(rows, found, strict=True) if not all(turns)),
    }


def untrained(rows: list[Row]) -> UntrainedFigures:
    """Count the assistant turns whose weight is 0, and the rows that have such turns."""
    counts = [
        sum(message["role"] == "assistant" and not is_trained(message) for message in row.conversation.messages)
        for row in rows
    ]
    return {"turns": sum(counts), "rows": sum(map(bool, counts))}


def efforts(rows: list[Row], default: str) -> dict[str, int]:
    """Count the rows of each reasoning effort. A row that sets no effort counts as `default`."""
    found = Counter(row.conversation.reasoning_effort or default for row in rows)
    return {name: found[name] for name in ("low", "medium", "high")}


def tools(rows: list[Row]) -> ToolFigures:
    """Count the rows that offer tools, and the rows that call tools.

    Also count the results, all calls, and the calls of each tool.
    """
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


def unoffered(rows: list[Row]) -> UnofferedFigures:
    """Count the calls of functions that `tools` of the row does not offer."""
    called: Counter[str] = Counter()
    matching = []
    for row in rows:
        offered = {tool["function"]["name"] for tool in row.conversation.tools or []}
        names = [call["function"]["name"] for turn in row.conversation.messages for call in _calls(turn)]
        others = [name for name in names if name not in offered]
        called.update(others)
        if others:
            matching.append(row)
    return {
        "calls": called.total(),
        "rows": len(matching),
        "by_name": dict(called.most_common()),
        "first": first(matching),
    }


def empty_answers(rows: list[Row]) -> EmptyAnswerFigures:
    """Count the trained answers without text."""
    counts = [
        sum(is_final(turn) and not turn["content"].strip() for turn in _trained_turns(row.conversation)) for row in rows
    ]
    matching = [row for row, count in zip(rows, counts, strict=True) if count]
    return {"turns": sum(counts), "rows": len(matching), "first": first(matching)}


def unanswered(rows: list[Row]) -> UnansweredFigures:
    """Find the rows whose last message is not an assistant message."""
    matching = [row for row in rows if row.conversation.messages[-1]["role"] != "assistant"]
    return {"rows": len(matching), "first": first(matching)}


def control_text(rows: list[Row]) -> ControlTextFigures:
    """Find text that looks like a control token. The model would learn to write it as text."""
    found: Counter[str] = Counter()
    matching = []
    for row in rows:
        matches = find_control_text(row.conversation)
        found.update(matches)
        if matches:
            matching.append(row)
    return {"rows": len(matching), "rows_by_token": dict(found.most_common()), "first": first(matching)}


def copies(rows: list[Row]) -> CopyFigures:
    """Find rows that repeat an earlier row word for word. Also count rows that repeat only its prompt."""
    seen: set[str] = set()
    prompts: set[str] = set()
    repeated, other_answer = [], 0
    for row in rows:
        conversation = row.conversation
        key = json.dumps([conversation.messages, conversation.tools, conversation.reasoning_effort], sort_keys=True)
        asked = json.dumps(prompt(conversation), sort_keys=True)
        if key in seen:
            repeated.append(row)
        elif asked in prompts:
            other_answer += 1
        seen.add(key)
        prompts.add(asked)
    return {"rows": len(repeated), "first": first(repeated), "same_prompt_other_answer": other_answer}


def languages(rows: list[Row], tell: Languages, how: Rendering) -> dict[str, dict[str, int]]:
    """Count the rows by the language of the prompts, of the reasoning and of the answers."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for kind, texts in _by_kind(row.conversation, how).items():
            if texts:
                found[kind][tell.of("\n".join(texts))] += 1
    return {kind: dict(found[kind].most_common()) for kind in ("prompts", "reasoning", "answers")}


def _by_kind(conversation: Conversation, how: Rendering) -> dict[str, list[str]]:
    turns = list(_trained_turns(conversation))
    return {
        "prompts": [message["content"] for message in conversation.messages if message["role"] == "user"],
        "reasoning": [text for turn in turns if (text := _reasoning(turn, how))],
        "answers": [turn["content"] for turn in turns if not _calls(turn)],
    }


def _trained_turns(conversation: Conversation) -> Iterator[Message]:
    return filter(is_trained, conversation.messages)


def _calls(message: Message) -> list[ToolCall]:
    return message.get("tool_calls", [])


def _reasoning(turn: Message, how: Rendering) -> str:
    is_in_content = bool(_calls(turn)) and how.form == RenderingForm.template.name
    return turn.get("thinking", "") or (turn["content"] if is_in_content else "")
