"""Transcripts: the answers of models.

Generation writes each transcript as a line of generations.jsonl, and scorers read these lines.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.data.conversations import Message

_PLAIN = r"(?:(?!<\|(?:start|channel|message|end|return|call)\|>).)*"
_MESSAGE = re.compile(
    rf"(?P<author>{_PLAIN})<\|channel\|>(?P<channel>{_PLAIN})<\|message\|>(?P<text>{_PLAIN})", re.DOTALL
)
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")


@dataclass(frozen=True)
class Transcript:
    """One answer of one model to one prompt.

    Attributes:
        prompt_id: identifies the prompt. It is the same for all models, so that their answers can be paired.
        sample: index of the answer among all answers to this prompt, from 0.
        messages: the conversation up to the answer.
        expected: properties of a right answer, for scorers: language, category, answer, safety.
        reasoning: text of the analysis channel, or None if the model wrote none.
        answer: text of the final channel, or None if the model wrote none.
        completion: the generated text with special tokens, or None if an endpoint hides the special tokens.
        finish: why generation ended: "return", "call" or "length", or another value that an endpoint reports.
        tokens: number of generated tokens.
        seed: seed of the sampling, or None for greedy decoding.
        tool_calls: "name" and "arguments" of each call. The arguments are text, exactly as the model wrote it.
        reference: the answer in the data, for reports. Scorers do not use it. None if the data have no answer.
    """

    prompt_id: str
    sample: int
    messages: list[Message]
    expected: dict[str, str]
    reasoning: str | None
    answer: str | None
    completion: str | None
    finish: str
    tokens: int
    seed: int | None
    tool_calls: list[dict[str, str]] = field(default_factory=list)
    reference: str | None = None


class Parsed(NamedTuple):
    """A completion, split into the text of each channel and the tool calls. A channel without messages is None."""

    reasoning: str | None
    answer: str | None
    tool_calls: list[dict[str, str]]


def parse(completion: str) -> Parsed:
    """Split a Harmony completion by channel.

    In every channel, a message with a recipient is a tool call. The text of a truncated message is kept. Text outside
    Harmony messages is skipped, so any completion can be parsed.

    Args:
        completion: the generated text after `<|start|>assistant`, with special tokens.
    """
    texts: dict[str, list[str]] = {}
    tool_calls = []
    for message in _MESSAGE.finditer(completion):
        recipient = _recipient(message)
        if recipient:
            tool_calls.append({"name": recipient[1].removeprefix("functions."), "arguments": message["text"]})
        else:
            texts.setdefault(message["channel"].strip(), []).append(message["text"])
    reasoning, answer = ("\n".join(texts[name]) if name in texts else None for name in ("analysis", "final"))
    return Parsed(reasoning, answer, tool_calls)


def calls_tool(completion: str) -> bool:
    """Return whether the last message is a tool call. Such a message ends with `<|call|>`."""
    messages = list(_MESSAGE.finditer(completion))
    return bool(messages) and _recipient(messages[-1]) is not None


def _recipient(message: re.Match[str]) -> re.Match[str] | None:
    return _RECIPIENT.search(message["author"]) or _RECIPIENT.search(message["channel"])
