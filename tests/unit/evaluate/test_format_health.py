"""Checks of channels, ends, leaks and loops, on typical completions of models."""

import pytest
from answers import transcript

from pipeline.evaluate.scorers import format_health
from pipeline.evaluate.scorers.format_health import CHECKS, is_loop
from pipeline.evaluate.subject import Subject
from pipeline.evaluate.transcripts import Transcript

ANALYSIS = "<|channel|>analysis<|message|>They greet.<|end|>"
FINAL = "<|channel|>final<|message|>Hello!<|return|>"
NEXT = "<|start|>assistant"
CALL = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>'


def complete(completion: str | None, **changed: str) -> Transcript:
    return transcript("Hello!", "They greet.", completion=completion, **changed)


@pytest.mark.parametrize(
    "completion",
    [
        FINAL,
        ANALYSIS + NEXT + FINAL,
        ANALYSIS + NEXT + "<|channel|>commentary<|message|>I will add.<|end|>" + NEXT + FINAL,
        ANALYSIS + NEXT + CALL,
        ANALYSIS + NEXT + ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>',
        ANALYSIS + NEXT + "<|channel|>final <|constrain|>json<|message|>{}<|return|>",
    ],
)
def test_completions_that_harmony_allows_are_well_formed(completion: str) -> None:
    assert format_health.is_well_formed(complete(completion)) is True


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "Hello!<|return|>",
        ANALYSIS + FINAL,
        ANALYSIS + NEXT + FINAL.replace("final", "finish"),
        ANALYSIS + NEXT + FINAL.removesuffix("<|return|>"),
        ANALYSIS + NEXT + FINAL.replace("<|message|>", ""),
        ANALYSIS + NEXT + FINAL.replace("Hello!", "Hel<|channel|>lo!"),
        FINAL + FINAL,
        ANALYSIS + "<|start|>user" + FINAL,
    ],
)
def test_completions_that_harmony_does_not_allow_are_not_well_formed(completion: str) -> None:
    assert format_health.is_well_formed(complete(completion)) is False


def test_checks_without_their_input_are_undecided() -> None:
    assert format_health.is_well_formed(complete(None)) is None
    assert format_health.is_well_formed(complete(ANALYSIS, finish="length")) is None
    assert format_health.does_not_leak(transcript(None)) is None
    assert format_health.has_answer(transcript(None, finish="call")) is None


@pytest.mark.parametrize(
    "answer",
    [
        "They greet.",
        " They  greet.\n",
        "Hello!<|end|>",
        "analysisThey greet.assistantfinalHello!",
        "finalHello!",
        "<|channel|>final<|message|>Hello!",
    ],
)
def test_reasoning_and_control_tokens_in_the_answer_are_a_leak(answer: str) -> None:
    assert format_health.does_not_leak(transcript(answer, "They greet.")) is False


@pytest.mark.parametrize("answer", ["Hello!", "Final answer: 7", "analysis: see below", "The analysis shows |x| < 3."])
def test_an_answer_that_mentions_analysis_is_not_a_leak(answer: str) -> None:
    assert format_health.does_not_leak(transcript(answer, "They greet.")) is True


LOOPS = {
    "words": "It is so. " + "the " * 60,
    "sentences": "I will check again. " * 12,
    "counting up": "".join(f"Step {i}: we look at the number {i} once more and add it to the sum. " for i in range(12)),
    "German": "Ich prüfe das noch einmal. " * 12,
    "French": "Je vérifie encore une fois. " * 12,
    "Spanish": "Voy a comprobarlo otra vez. " * 12,
    "Italian": "Controllo ancora una volta. " * 12,
    "Russian": "Я проверю это ещё раз. " * 12,
    "Chinese": "我再检查一遍。" * 40,
    "Japanese": "もう一度確認します。" * 30,
    "truncated in the middle": "I will check again. " * 12 + "I will ch",
}
NO_LOOPS = {
    "twice": "Step one, we look at it. " * 2,
    "a line": "-" * 500,
    "an ending that only begins to repeat": "A text of some length that says a thing or two. No, no, no, no!",
    "numbers": " ".join(map(str, range(200))),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_found(name: str) -> None:
    assert is_loop(LOOPS[name])


@pytest.mark.parametrize("name", NO_LOOPS)
def test_a_short_repetition_is_not_a_loop(name: str) -> None:
    assert not is_loop(NO_LOOPS[name])


def test_a_loop_in_the_reasoning_counts() -> None:
    assert format_health.does_not_loop(transcript("Hello!", LOOPS["sentences"])) is False


def test_a_sound_transcript_passes_every_check() -> None:
    made = complete(ANALYSIS + NEXT + FINAL)
    assert {name: check(made) for name, check in CHECKS.items()} == dict.fromkeys(CHECKS, True)


def test_shares_count_only_decided_transcripts() -> None:
    made = [
        complete(ANALYSIS + NEXT + FINAL, prompt_id="1"),
        complete(FINAL + FINAL, prompt_id="2"),
        transcript(None, "Hm", prompt_id="3", completion="<|channel|>analysis<|message|>Hm", finish="length"),
        complete(None, prompt_id="4", finish="stop"),
    ]
    found = format_health.score(Subject(None, None, None, None, [], made))
    assert found["format_health"] == 0.5
    assert found["format_health/ended"] == found["format_health/not_cut"] == found["format_health/answered"] == 0.75
    assert found["format_health/well_formed"] == 0.5
