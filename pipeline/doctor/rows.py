"""Render each row as training will see it. Count its examples, their tokens, and the tokens that truncation removes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypedDict

from pipeline.data import harmony
from pipeline.data.conversations import Conversation, ConversationError
from pipeline.data.harmony import Rendering
from pipeline.data.scripts import Script
from pipeline.errors import RowProblems
from pipeline.runs.console import progress

_FIRST_LENGTH = 64
_ROWS_AT_ONCE = 64


class TokenCounts(TypedDict):
    """Numbers of examples and tokens before truncation, and the supervised share of the tokens."""

    examples: int
    all: int
    supervised: int
    supervised_share: float


class Lengths(TypedDict):
    """Percentiles of the examples' lengths in tokens, and a histogram (upper edge of a bin -> its count)."""

    shortest: int
    median: int
    p95: int
    longest: int
    histogram: dict[str, int]


class Truncated(TypedDict):
    """Rows and examples that are longer than `max_length`, and the tokens that they lose.

    `first` has the places of the first few such rows. `first` has this meaning in all figures of doctor.
    """

    max_length: int
    rows: int
    examples: int
    tokens_lost: int
    supervised_tokens_lost: int
    supervised_share_lost: float
    first: list[str]


class NothingToLearn(TypedDict):
    """How many examples have no supervised token after truncation, and how many rows have only such examples."""

    examples: int
    rows: int
    first: list[str]


class TokenFigures(TypedDict):
    """Figures of the examples' tokens."""

    tokens: TokenCounts
    lengths: Lengths
    cut: Truncated
    nothing_to_learn: NothingToLearn


@dataclass(frozen=True)
class Example:
    """Token counts of a rendered example. `kept` and `kept_supervised` count the tokens after truncation."""

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
        UserError: the chat template refuses some rows. The error gives the place of each.
    """
    rows: list[Row] = []
    problems = RowProblems()
    batch: list[tuple[Conversation, Script]] = []
    for conversation in progress(conversations, what="examining", unit="row"):
        try:
            batch.append((conversation, harmony.render(conversation, how)))
        except ConversationError as error:
            problems.add(conversation.where, str(error))
        if len(batch) >= _ROWS_AT_ONCE:
            rows += _count(batch, how, max_length)
            batch = []
    rows += _count(batch, how, max_length)
    problems.raise_if_any()
    return rows


def figures(rows: list[Row], limit: int) -> TokenFigures:
    """Count examples and tokens, describe the lengths, and count the tokens that truncation at `limit` removes."""
    every = [example for row in rows for example in row.examples]
    tokens, supervised = sum(e.tokens for e in every), sum(e.supervised for e in every)
    return {
        "tokens": {
            "examples": len(every),
            "all": tokens,
            "supervised": supervised,
            "supervised_share": supervised / tokens,
        },
        "lengths": _lengths([example.tokens for example in every]),
        "cut": _truncation(rows, limit, supervised),
        "nothing_to_learn": {
            "examples": sum(e.kept_supervised == 0 for e in every),
            "rows": sum(all(e.kept_supervised == 0 for e in row.examples) for row in rows),
            "first": first(row for row in rows if any(e.kept_supervised == 0 for e in row.examples)),
        },
    }


def first(rows: Iterable[Row], most: int = 3) -> list[str]:
    """Return the places of the first few rows."""
    return [row.conversation.where for _, row in zip(range(most), rows, strict=False)]


def _count(batch: list[tuple[Conversation, Script]], how: Rendering, limit: int) -> Iterator[Row]:
    made = harmony.tokenize([script for _, script in batch], how.tokenizer, limit)
    for (conversation, _), found in zip(batch, made, strict=True):
        yield Row(
            conversation,
            [Example(e.length, e.supervised, min(e.length, limit), e.kept_supervised) for e in found],
        )


def _lengths(lengths: list[int]) -> Lengths:
    ordered = sorted(lengths)
    return {
        "shortest": ordered[0],
        "median": _percentile(ordered, 0.5),
        "p95": _percentile(ordered, 0.95),
        "longest": ordered[-1],
        "histogram": _histogram(ordered),
    }


def _percentile(ordered: list[int], share: float) -> int:
    return ordered[round(share * (len(ordered) - 1))]


def _histogram(lengths: list[int]) -> dict[str, int]:
    """Count the examples by length: up to 64 tokens, 65 to 128, and so on. Empty bins at the start are left out."""
    histogram: dict[str, int] = {}
    below, edge = 0, _FIRST_LENGTH
    while below < len(lengths):
        count = sum(length <= edge for length in lengths) - below
        if count or histogram:
            histogram[str(edge)] = count
        below, edge = below + count, 2 * edge
    return histogram


def _truncation(rows: list[Row], limit: int, supervised: int) -> Truncated:
    longer = [example for row in rows for example in row.examples if example.tokens > limit]
    longer_rows = [row for row in rows if any(example.tokens > limit for example in row.examples)]
    lost = sum(example.supervised - example.kept_supervised for example in longer)
    return {
        "max_length": limit,
        "rows": len(longer_rows),
        "examples": len(longer),
        "tokens_lost": sum(example.tokens - example.kept for example in longer),
        "supervised_tokens_lost": lost,
        "supervised_share_lost": lost / supervised,
        "first": first(longer_rows),
    }
