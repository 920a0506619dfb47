"""Measure models one after the other: generate answers, judge answers and compute figures.

Inputs that all models share are prepared only once.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pipeline.config import DataConfig, EndpointApi, EvaluateConfig, ModelConfig
from pipeline.data.examples import prepare_examples, rendering_of
from pipeline.data.harmony import Rendering
from pipeline.data.rows import Rows, load_rows
from pipeline.data.tokenizers import Tokenizer, load_tokenizer, read_vocabulary
from pipeline.errors import Attempts, UserError, user_errors
from pipeline.evaluate import groups
from pipeline.evaluate.expected import check
from pipeline.evaluate.generation import client, endpoint, prompts
from pipeline.evaluate.generation.endpoint import Served
from pipeline.evaluate.generation.journal import Journal
from pipeline.evaluate.generation.prompts import Question
from pipeline.evaluate.scorers import EVALS, harness, judge, logits
from pipeline.evaluate.scorers.judge import Judge, Judgement
from pipeline.evaluate.subject import Subject
from pipeline.evaluate.transcripts import Transcript
from pipeline.models import attention, loading, losses, placement, source
from pipeline.models.references import ModelRef
from pipeline.models.weights import Weights
from pipeline.runs.console import say
from pipeline.runs.run import PREDICTIONS_DIR, Run
from pipeline.runs.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ASKED = tuple(f"evaluate.generation.{name}" for name in ("max_new_tokens", "temperature", "top_p", "seed"))
_RENDERED = ("data.model_identity", "data.conversation_date", "data.rendering")
_DECIDE_SERVED = {
    EndpointApi.completions.name: (*_ASKED, *_RENDERED, "model.path", "model.revision"),  # model.*: the tokenizer
    EndpointApi.chat.name: _ASKED,
}
"""Name of an API -> settings that a served model's answer depends on. The model and the prompt are not listed."""
_DECIDE_LOCAL = ("evaluate.generation", "model.dtype", *_RENDERED)
"""Settings that a local model's answer depends on. The batch size may change the last bit of a sum."""
_DECIDE_VERDICT = ("evaluate.judge.max_new_tokens", "evaluate.judge.attempts")
_SHOWN = {"validation_loss": "validation loss {:.4f}", "kl_divergence": "divergence from the reference {:.4g}"}
_TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja")


@dataclass(frozen=True)
class Task:
    """The inputs that all measurements share.

    Attributes:
        run: the run that this evaluation belongs to.
        data, model, evaluate: sections of the run's configuration.
        rows: the rows of `data`.
        questions: the questions that models answer, or an empty list.
        judge: the judge of the answers, or None.
        suites: the tasks of lm-evaluation-harness, or None.
    """

    run: Run
    data: DataConfig
    model: ModelConfig
    evaluate: EvaluateConfig
    rows: Rows
    questions: list[Question]
    judge: Judge | None
    suites: harness.Suites | None


class _Validation(NamedTuple):
    batches: Sequence[dict[str, Tensor]]
    groups: Sequence[str]


def prepare(run: Run, data: DataConfig, model: ModelConfig, evaluate: EvaluateConfig) -> Task:
    """Read the data and the prompts, and find the judge and the tasks, before any long computation.

    Raises:
        UserError: a row or prompt is bad, a prompt lacks a property that a scorer needs, the judge does not exist, or
            a task does not exist.
    """
    rows, questions, suites = check_inputs(run, data, evaluate)
    return Task(run, data, model, evaluate, rows, questions, judge.find(evaluate.judge), suites)


def check_inputs(
    run: Run, data: DataConfig, evaluate: EvaluateConfig
) -> tuple[Rows, list[Question], harness.Suites | None]:
    """Read the data and the prompts, and find the tasks. No server is contacted.

    Raises:
        UserError: a row or prompt is bad, a column is missing, a prompt lacks a property that a scorer needs, no
            prompt can be judged, an API key is missing, or a task does not exist.
    """
    rows, errors = load_rows(run, data), Attempts()
    questions = errors.attempt(lambda: _questions(run, data, evaluate, rows)) or []
    errors.attempt(lambda: groups.check_column(run, data, evaluate.group_column))
    for key, server in ((endpoint.KEY, evaluate.endpoint), (judge.KEY, evaluate.judge)):
        if server.url is not None:
            errors.attempt(lambda key=key, server=server: client.read_key(server, key))  # type: ignore[misc]
    suites = errors.attempt(lambda: harness.Suites(evaluate.lm_eval)) if evaluate.lm_eval.tasks else None
    errors.raise_if_any()
    if evaluate.judge.url is not None and not any("safety" in each.prompt.expected for each in questions):
        raise UserError(
            f"{judge.KEY}.url={evaluate.judge.url}: no prompt is marked as safe or unsafe, so there is nothing to"
            " judge. Mark all prompts (evaluate.prompts.expected_of_all.safety=safe), or name the column with the"
            " marks (evaluate.prompts.expected.safety=<column>)."
        )
    return rows, questions, suites


def check_tokens(refs: Sequence[ModelRef], reference: ModelRef | None) -> None:
    """Check that all models have the reference's vocabulary. Otherwise figures per token cannot be compared.

    Adapters must also have the vocabulary of the base that they are merged on, because its tokenizer is used.

    Raises:
        UserError: some models have another vocabulary. The message names their directories.
    """
    _raise_if_adapters_have_other_tokens(refs)
    others = [ref for ref in refs if reference and _tokenizer_file(ref) != _tokenizer_file(reference)]
    if not reference or not others:
        return
    vocabulary = load_tokenizer(reference.base).get_vocab()
    wrong = [ref for ref in others if load_tokenizer(ref.base).get_vocab() != vocabulary]
    if wrong:
        raise user_errors(
            [
                f"{ref.directory}: its vocabulary differs from the vocabulary of {reference.directory}, so"
                " losses and predictions cannot be compared. Evaluate it in another run: set another run_dir and"
                f" evaluate.source={ref.directory}."
                for ref in wrong
            ]
        )


def _raise_if_adapters_have_other_tokens(refs: Sequence[ModelRef]) -> None:
    own = [ref for ref in refs if ref.adapter and (ref.directory / _TOKENIZER_FILES[0]).is_file()]
    wrong = [
        f"{ref.directory / _TOKENIZER_FILES[0]}: the vocabulary of these adapters differs from the vocabulary of"
        f" {ref.base}, on which they are merged. So they were trained on other tokens. Set model.path to the model that"
        " they were trained on, in another run_dir."
        for ref in own
        if (ref.directory / _TOKENIZER_FILES[0]).read_bytes() != _tokenizer_file(ref)
        and read_vocabulary(ref.directory / _TOKENIZER_FILES[0]) != load_tokenizer(ref.base).get_vocab()
    ]
    if wrong:
        raise user_errors(wrong)


def file_name(name: str) -> str:
    """Turn a model's name into a file name. The model's name may be a path."""
    return name.strip("/").replace("/", "_")


class Measure:
    """Measures models, one after the other."""

    def __init__(self, task: Task, directory: Path, reference: ModelRef | None) -> None:
        """
        Args:
            task: the inputs of all measurements.
            directory: the directory of the stage. A model's answers go to the subdirectory `file_name(<model's name>)`.
            reference: the model whose weights and predictions are the reference. It is required for local models.
        """
        self._task = task
        self._directory = directory
        self._reference = reference
        self._validation_of: dict[bytes, _Validation] = {}  # keys: bytes of the tokenizer's files

    def figures(self, subject: ModelRef | Served) -> dict[str, float]:
        """Measure all figures of one model."""
        scored = self._ask_served(subject) if isinstance(subject, Served) else self._run_local(subject)
        figures = {name: value for score in EVALS.values() for name, value in score(scored).items()}
        shown = [form.format(figures[name]) for name, form in _SHOWN.items() if name in figures]
        answers = [f"{len(scored.transcripts)} answers"] if scored.transcripts else []
        say("evaluate", f"{subject.name}: {', '.join([*shown, *answers]) or 'measured'}")
        return figures

    def _ask_served(self, served: Served) -> Subject:
        evaluate, questions = self._task.evaluate, self._task.questions
        decide = self._task.run.settings(_DECIDE_SERVED[served.api])
        transcripts: list[Transcript] = []
        if questions:
            journal: Journal[Transcript] = Journal(self._answers_of(served), {"model": served.fingerprint, **decide})
            rendered = endpoint.APIS[served.api].is_rendered_here
            token_ids = prompts.token_ids(questions, self._rendering) if rendered else [[]] * len(questions)
            asked = list(zip(questions, token_ids, strict=True))
            endpoint.ask(served, asked, journal, endpoint=evaluate.endpoint, settings=evaluate.generation)
            transcripts = [journal[question.key] for question in questions]
        return Subject(
            None,
            None,
            None,
            None,
            [],
            transcripts,
            judgements=self._judge(served, decide, transcripts),
            suites=self._suites(
                lambda suites: suites.score_served(served, evaluate.endpoint, self._tokenizer_directory)
            ),
        )

    def _run_local(self, ref: ModelRef) -> Subject:
        assert self._reference is not None
        tokenizer = load_tokenizer(ref.base)
        validation = self._validation(ref, tokenizer)
        predictions = self._predictions(ref, validation.batches)
        model = self._load(ref)
        rendering = rendering_of(self._task.data, tokenizer)
        decide: Settings = {"evaluate.prompts": prompts.fingerprint(self._task.questions)}
        decide |= self._task.run.settings(_DECIDE_LOCAL)
        transcripts: list[Transcript] = []
        if self._task.questions:
            from pipeline.evaluate.generation.local import (
                Local,
            )  # slow, and reports that are up to date need no answers

            journal: Journal[Transcript] = Journal(self._answers_of(ref), {"model": ref.fingerprint, **decide})
            Local(model, rendering, self._task.evaluate.generation).ask(self._task.questions, journal, ref.name)
            transcripts = [journal[question.key] for question in self._task.questions]
        return Subject(
            ref,
            model,
            Weights(ref),
            Weights(self._reference),
            validation.batches,
            transcripts,
            validation.groups,
            predictions,
            self._judge(ref, decide, transcripts),
            self._suites(lambda suites: suites.score_model(model, rendering)),
        )

    def _judge(
        self, subject: ModelRef | Served, decide: Settings, transcripts: list[Transcript]
    ) -> dict[tuple[str, int], Judgement] | None:
        asked, settings = self._task.judge, self._task.evaluate.judge
        if asked is None:
            return None
        inputs = {"model": subject.fingerprint, **decide, "judge": asked.fingerprint}
        inputs |= self._task.run.settings(_DECIDE_VERDICT)
        journal: Journal[Judgement] = Journal(self._answers_of(subject), inputs, judge.JUDGEMENTS)
        return judge.judge(asked, settings, transcripts, journal, name=subject.name)

    def _suites(self, measure: Callable[[harness.Suites], dict[str, float]]) -> dict[str, float]:
        return measure(self._task.suites) if self._task.suites else {}

    def _predictions(self, ref: ModelRef, batches: Sequence[dict[str, Tensor]]) -> Path | None:
        """Return the directory of the reference's predictions on these batches. Make it if it is missing or damaged.

        Call this before `ref` is loaded, so that two models are never in memory together. The result is None if `ref`
        is the reference itself.
        """
        assert self._reference is not None
        if ref.fingerprint == self._reference.fingerprint:
            return None
        made = logits.fingerprint(self._reference, self._dtype, batches)
        directory = self._task.run.stage_dir(PREDICTIONS_DIR) / made
        if not logits.are_sound(directory):
            logits.record(self._load(self._reference), batches, directory)
            gc.collect()  # frees the reference model, whose modules refer to each other in cycles
        return directory

    def _load(self, ref: ModelRef) -> "PreTrainedModel":
        placement.raise_if_host_too_small("evaluate", ref.base, self._dtype)
        return loading.load_effective(ref, self._dtype, spread=True, attn_implementation=self._attention)

    def _validation(self, ref: ModelRef, tokenizer: Tokenizer) -> _Validation:
        files = b"".join(path.read_bytes() for name in _TOKENIZER_FILES if (path := ref.base / name).is_file())
        if files not in self._validation_of:
            task, settings = self._task, self._task.evaluate
            splits = prepare_examples(task.run, task.data, task.rows, tokenizer)
            examples, rows = splits.validation, splits.validation_rows
            count = min(settings.max_samples or len(examples), len(examples))
            batches = losses.batches(examples.select(range(count)), settings.batch_size, tokenizer.pad_token_id)
            of_examples = groups.group_examples(
                task.run, task.data, settings.group_column, rows=task.rows, numbers=rows[:count]
            )
            self._validation_of[files] = _Validation(batches, of_examples)
        return self._validation_of[files]

    def _answers_of(self, subject: ModelRef | Served) -> Path:
        return self._directory / file_name(subject.name)

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self._task.model.dtype.name)

    @cached_property
    def _attention(self) -> str:
        chosen = attention.for_inference(self._dtype)
        say("evaluate", f"attention: {chosen}")
        return chosen

    @cached_property
    def _tokenizer_directory(self) -> Path:
        """The directory of model.path's tokenizer.

        This tokenizer is used for a model on a server, because the server's own tokenizer cannot be read.
        """
        return source.locate_without_weights(self._task.run, self._task.model)

    @cached_property
    def _rendering(self) -> Rendering:
        return rendering_of(self._task.data, load_tokenizer(self._tokenizer_directory))


def _questions(run: Run, data: DataConfig, evaluate: EvaluateConfig, rows: Rows) -> list[Question]:
    if not evaluate.generate:
        return []
    loaded = prompts.load(run, data, evaluate.prompts, rows)
    check((prompt.prompt_id, prompt.expected) for prompt in loaded)
    return prompts.questions(loaded, evaluate.generation.samples)


def _tokenizer_file(ref: ModelRef) -> bytes:
    path = ref.base / _TOKENIZER_FILES[0]
    return path.read_bytes() if path.is_file() else b""
