"""What a model said to a prompt: a line of generations.jsonl, which generation writes and scorers read."""

from dataclasses import dataclass
from typing import Any


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
