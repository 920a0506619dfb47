"""Samples of a model in training. A resumed run keeps earlier samples, and a sharded model writes no samples."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.data.conversations import Conversation
from pipeline.evaluate.generation.prompts import Prompt, Question
from pipeline.evaluate.samples import Samples
from pipeline.evaluate.transcripts import Transcript
from pipeline.runs.artifacts import BOOKKEEPING, SAMPLES_FILE

QUESTION = Question(Prompt("id", Conversation([{"role": "user", "content": "2 + 3?"}]), {}), 0)
ANSWER = Transcript("id", 0, QUESTION.prompt.conversation.messages, {}, "so", "5\u2028", "…", "return", 4, None)


class Model(nn.Linear):
    device = torch.device("cpu")


def samples(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Samples:
    made = Samples(SimpleNamespace(token_ids=lambda asked: [[1]] * len(asked)), [QUESTION], directory)  # type: ignore[arg-type]
    monkeypatch.setattr(made, "_answers", lambda model, in_bf16: [ANSWER])
    return made


def evaluate(made: Samples, step: int, model: Any = None) -> None:
    state, arguments = SimpleNamespace(global_step=step), SimpleNamespace(bf16=False)
    made.on_evaluate(arguments, state, None, model=Model(2, 2) if model is None else model)


def steps(directory: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (directory / SAMPLES_FILE).read_bytes().splitlines()]


def test_a_line_tells_the_step_the_question_and_what_was_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(samples(tmp_path, monkeypatch), 3)
    assert json.loads((tmp_path / SAMPLES_FILE).read_bytes()) == {
        "step": 3,
        "prompt": "2 + 3?",
        "reasoning": "so",
        "answer": "5\u2028",
        "completion": "…",
        "finish": "return",
        "tokens": 4,
    }


def test_a_resumed_run_keeps_the_samples_of_the_steps_that_it_does_not_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (0, 5, 10):
        evaluate(samples(tmp_path, monkeypatch), step)
    evaluate(samples(tmp_path, monkeypatch), 5)
    assert steps(tmp_path) == [0, 5]


def test_samples_are_no_part_of_what_a_stage_has_made() -> None:
    assert SAMPLES_FILE in BOOKKEEPING


def test_a_model_that_is_spread_over_processes_writes_none_and_it_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spread = Model(2, 2)
    spread.weight.ds_id = 0  # type: ignore[attr-defined]
    made = samples(tmp_path, monkeypatch)
    evaluate(made, 0, spread)
    evaluate(made, 5, spread)
    assert not (tmp_path / SAMPLES_FILE).exists()
    assert capsys.readouterr().out.count("no samples: the model is sharded, and no process can run it alone") == 1
