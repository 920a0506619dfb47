"""Generate answers to a few prompts at each validation during training.

The answers are written to <stage>/samples.jsonl and to a table of the tracking service. They do not affect training.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
from pipeline.runs.metrics import read_lines
from pipeline.runs.processes import is_main_process
from pipeline.runs.run import Run
from pipeline.runs.tracking import log_table

_COLUMNS = ["step", "prompt", "reasoning", "answer", "completion", "finish", "tokens"]


def callback(
    run: Run, data: DataConfig, evaluate: EvaluateConfig, *, rows: Rows, tokenizer: Tokenizer, directory: Path
) -> list[TrainerCallback]:
    """Make the callback for `evaluate.during_training`. Return an empty list if no prompts are requested.

    Args:
        run: the run of the training stage.
        data, evaluate: sections of the run's configuration.
        rows: the rows of `data`.
        tokenizer: the tokenizer of the model.
        directory: directory of the training stage.

    Raises:
        UserError: the prompts cannot be loaded or rendered (see `prompts.load` and `prompts.token_ids`).
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
    """Callback that lets the model answer the prompts after each validation."""

    def __init__(self, local: Local, asked: list[Question], directory: Path) -> None:
        self._local = local
        self._asked = tuple(asked)
        self._prompts = tuple(local.token_ids(asked))
        self._directory = directory
        self._stage = directory.name
        self._is_sharded = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **_: object,
    ) -> None:
        """Write the model's answers. A sharded model is not asked, because a single process cannot run it."""
        assert model is not None
        if self._is_sharded or not is_main_process():
            return
        if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()):
            self._is_sharded = True
            say(self._stage, "no samples: the model is sharded, and no process can run it alone")
            return
        rows = [_row(state.global_step, answer) for answer in self._answers(model, args.bf16)]
        log_table(self._directory, Path(SAMPLES_FILE).stem, _COLUMNS, self._before(state.global_step) + rows)

    def _answers(self, model: PreTrainedModel, in_bf16: bool) -> list[Transcript]:
        was_training = model.training
        model.eval()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=in_bf16):
            answers = replace(self._local, model=model).answer(self._asked, self._prompts)
        model.train(was_training)
        return answers

    def _before(self, step: int) -> list[list[object]]:
        """Read the samples with a step below `step`. The others are dropped, because a resumed run makes them again."""
        rows = read_lines(self._directory / SAMPLES_FILE)
        return [[row[name] for name in _COLUMNS] for row in rows if row["step"] < step]


def _row(step: int, answer: Transcript) -> list[object]:
    question = answer.messages[-1]["content"]
    return [step, question, answer.reasoning, answer.answer, answer.completion, answer.finish, answer.tokens]
