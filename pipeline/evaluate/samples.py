"""An early look at a model in training: what it answers to a few prompts, at each validation.

Shown as <stage>/samples.jsonl and as a table of the tracking service. Nothing that training computes depends on it.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from pipeline.config import DataConfig, EvaluateConfig
from pipeline.data.examples import rendering_of
from pipeline.data.rows import Rows
from pipeline.data.tokenizers import Tokenizer
from pipeline.evaluate.generation import prompts
from pipeline.evaluate.generation.local import Local
from pipeline.evaluate.generation.prompts import Question
from pipeline.evaluate.transcripts import Transcript
from pipeline.runs.artifacts import SAMPLES_FILE
from pipeline.runs.console import say
from pipeline.runs.processes import is_main_process
from pipeline.runs.run import Run
from pipeline.runs.tracking import log_table

_COLUMNS = ["step", "prompt", "reasoning", "answer", "completion", "finish", "tokens"]


def callback(
    run: Run, data: DataConfig, evaluate: EvaluateConfig, *, rows: Rows, tokenizer: Tokenizer, directory: Path
) -> list[TrainerCallback]:
    """Make the callback that `evaluate.during_training` sets: none, or one.

    Args:
        run: that the stage belongs to.
        data: its settings.
        evaluate: its settings.
        rows: of `data`.
        tokenizer: of the model.
        directory: of the training stage.

    Raises:
        UserError: as `prompts.load`.
    """
    settings = evaluate.during_training
    if not settings.prompts:
        return []
    asked = prompts.questions(prompts.load(run, data, evaluate.prompts, rows, settings.prompts), samples=1)
    greedy = replace(
        evaluate.generation,
        temperature=0.0,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.prompts,
    )
    local = Local(None, rendering_of(data, tokenizer), greedy, limit="evaluate.during_training.prompts")
    return [Samples(local, asked, directory)]


class Samples(TrainerCallback):
    """Lets the model answer after each validation."""

    def __init__(self, local: Local, asked: list[Question], directory: Path) -> None:
        self._local = local
        self._asked = tuple(asked)
        self._prompts = tuple(local.token_ids(asked))
        self._directory = directory
        self._stage = directory.name
        self._is_sharded = False

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._is_sharded or not is_main_process():
            return
        if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()):
            self._is_sharded = True
            say(self._stage, "no samples: the model is spread over several processes, none of which can write alone")
            return
        rows = [_row(state.global_step, answer) for answer in self._answers(model, args.bf16)]
        log_table(self._directory, Path(SAMPLES_FILE).stem, _COLUMNS, self._before(state.global_step) + rows)

    def _answers(self, model: Any, in_bf16: bool) -> list[Transcript]:
        was_training = model.training
        model.eval()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=in_bf16):
            answers = replace(self._local, model=model).answer(self._asked, self._prompts)
        model.train(was_training)
        return answers

    def _before(self, step: int) -> list[list[Any]]:
        """Samples of earlier steps; those of steps that a resumed run repeats are forgotten."""
        path = self._directory / SAMPLES_FILE
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
        return [[row[name] for name in _COLUMNS] for row in rows if row["step"] < step]


def _row(step: int, answer: Transcript) -> list[Any]:
    question = answer.messages[-1]["content"]
    return [step, question, answer.reasoning, answer.answer, answer.completion, answer.finish, answer.tokens]
