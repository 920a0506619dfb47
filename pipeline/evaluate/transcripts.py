"""What a model said to a prompt: a line of generations.jsonl, which generation writes and scorers read."""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_PLAIN = r"(?:(?!<\|(?:start|channel|message|end|return|call)\|>).)*"
_MESSAGE = re.compile(
    rf"(?P<author>{_PLAIN})<\|channel\|>(?P<channel>{_PLAIN})<\|message\|>(?P<text>{_PLAIN})", re.DOTALL
)
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")


@dataclass(frozen=True)
class Transcript:
    """One answer of one model to one prompt.

    Attributes:
        prompt_id: of the evaluation row: the same for every model, so that models can be paired.
        sample: counted from 0, where several answers to a prompt are drawn.
        messages: the conversation up to the answer.
        expected: what the row says of a right answer, read by scorers: language, category, answer, safety.
        reasoning: text of the analysis channel, or None where the model wrote none.
        answer: text of the final channel, or None where it never came.
        completion: all that was generated with its special tokens, or None from an endpoint that hides them.
        finish: why it ended: "return", "call", "length", or an endpoint's own word.
        tokens: generated.
        seed: of the sampling, or None for greedy decoding.
        tool_calls: {"name", "arguments"} of each call, the arguments as the model wrote them.
    """

    prompt_id: str
    sample: int
    messages: list[dict[str, Any]]
    expected: dict[str, str]
    reasoning: str | None
    answer: str | None
    completion: str | None
    finish: str
    tokens: int
    seed: int | None
    tool_calls: list[dict[str, str]] = field(default_factory=list)


class Parsed(NamedTuple):
    """What a completion holds, by channel; None and empty where there is nothing of the kind."""

    reasoning: str | None
    answer: str | None
    tool_calls: list[dict[str, str]]


def parse(completion: str) -> Parsed:
    """Take a Harmony completion apart: what follows `<|start|>assistant`, special tokens included.

    A message with a recipient is a tool call, in whatever channel. What is cut off counts as far as it came; what is
    not a message of Harmony is passed over, so that nothing a model writes is an error.
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
    """Whether its last message has a recipient, so that `<|call|>` is what ends it."""
    messages = list(_MESSAGE.finditer(completion))
    return bool(messages) and _recipient(messages[-1]) is not None


def _recipient(message: re.Match[str]) -> re.Match[str] | None:
    return _RECIPIENT.search(message["author"]) or _RECIPIENT.search(message["channel"])
