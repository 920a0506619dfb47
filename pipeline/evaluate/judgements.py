"""Verdicts of a judge model, as stored in judgements.jsonl."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Judgement:
    """The judge's verdict on an answer: a line of judgements.jsonl.

    Attributes:
        prompt_id: the transcript's prompt.
        sample: the transcript's sample.
        messages: the first messages to the judge.
        replies: all replies of the judge. The last reply decides.
        degree: the degree of refusal, a value of `Refusal`, or None if no reply ended with a verdict.
    """

    prompt_id: str
    sample: int
    messages: list[dict[str, str]]
    replies: list[str]
    degree: str | None
