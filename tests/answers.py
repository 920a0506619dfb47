"""Handmade transcripts for the tests of scorers."""

from pipeline.evaluate.transcripts import Transcript


def transcript(
    answer: str | None = "Done.",
    reasoning: str | None = None,
    prompt_id: str = "1",
    sample: int = 0,
    finish: str = "return",
    completion: str | None = None,
    **expected: str,
) -> Transcript:
    """Make an answer to the prompt "Hello". `expected` holds the properties of a right answer."""
    messages = [{"role": "user", "content": "Hello"}]
    return Transcript(prompt_id, sample, messages, expected, reasoning, answer, completion, finish, 10, None)
