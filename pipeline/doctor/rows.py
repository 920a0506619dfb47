"""Each row as training will see it: its examples, their tokens, and the tokens that data.max_length cuts off."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.data.harmony import IGNORED, Conversation, ConversationError, Rendering, examples
from pipeline.errors import Problems
from pipeline.runs.console import progress

_FIRST_LENGTH = 64
_PERCENTILES = {"median": 0.5, "p95": 0.95}


@dataclass(frozen=True)
class Example:
    """Numbers of tokens of a rendered example: all and supervised, before and after truncation."""

    tokens: int
    supervised: int
    kept: int
    kept_supervised: int


@dataclass(frozen=True)
class Row:
    """A conversation and its examples, one per supervised assistant turn."""

    conversation: Conversation
    examples: list[Example]


def examine(conversations: Iterable[Conversation], how: Rendering, max_length: int) -> list[Row]:
    """Render and count the examples of conversations.

    Raises:
        UserError: the chat template refuses some rows. Each is named with its place.
    """
    rows, problems = [], Problems()
    for conversation in progress(conversations, what="examining", unit="row"):
        try:
            counted = [_count(example, max_length) for example in examples(conversation, how)]
        except ConversationError as error:
            problems.add(f"{conversation.where}: {error}.")
        else:
            rows.append(Row(conversation, counted))
    problems.raise_if_any()
    return rows


def figures(rows: list[Row], limit: int) -> dict[str, Any]:
    """Counts of examples and tokens, their lengths, and the losses from truncating examples to `limit` tokens."""
    every = [example for row in rows for example in row.examples]
    cut = [example for example in every if example.tokens > limit]
    tokens, supervised = sum(e.tokens for e in every), sum(e.supervised for e in every)
    lost = sum(e.supervised - e.kept_supervised for e in cut)
    return {
        "tokens": {
            "examples": len(every),
            "all": tokens,
            "supervised": supervised,
            "supervised_share": supervised / tokens,
        },
        "lengths": _lengths([example.tokens for example in every]),
        "cut": {
            "max_length": limit,
            "rows": sum(any(e.tokens > limit for e in row.examples) for row in rows),
            "examples": len(cut),
            "tokens_lost": sum(e.tokens - e.kept for e in cut),
            "supervised_tokens_lost": lost,
            "supervised_share_lost": lost / supervised,
            "first": first(row for row in rows if any(e.tokens > limit for e in row.examples)),
        },
        "nothing_to_learn": {
            "examples": sum(e.kept_supervised == 0 for e in every),
            "rows": sum(all(e.kept_supervised == 0 for e in row.examples) for row in rows),
            "first": first(row for row in rows if any(e.kept_supervised == 0 for e in row.examples)),
        },
    }


def first(rows: Iterable[Row], most: int = 3) -> list[str]:
    """Places of the first few rows."""
    return [row.conversation.where for _, row in zip(range(most), rows, strict=False)]


def _count(example: dict[str, list[int]], limit: int) -> Example:
    labels, kept = example["labels"], example["labels"][:limit]
    return Example(len(labels), _supervised(labels), len(kept), _supervised(kept))


def _supervised(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORED)


def _lengths(lengths: list[int]) -> dict[str, Any]:
    """Percentiles, and the histogram: how many are up to 64 tokens long, up to 128, …"""
    ordered = sorted(lengths)
    histogram: dict[str, int] = {}
    below, edge = 0, _FIRST_LENGTH
    while below < len(ordered):
        count = sum(length <= edge for length in ordered) - below
        if count or histogram:
            histogram[str(edge)] = count
        below, edge = below + count, 2 * edge
    at = {name: ordered[round(share * (len(ordered) - 1))] for name, share in _PERCENTILES.items()}
    return {"shortest": ordered[0], **at, "longest": ordered[-1], "histogram": histogram}
