"""All figures of one model after the other: it is asked, judged and scored; what models have in common is made once."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.config import EndpointApi, PipelineConfig
from pipeline.data.examples import prepare_examples, rendering_of
from pipeline.data.rows import Rows, load_rows
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import UserError, user_errors
from pipeline.evaluate import groups
from pipeline.evaluate.expected import check
from pipeline.evaluate.generation import endpoint, prompts
from pipeline.evaluate.generation.endpoint import Served
from pipeline.evaluate.generation.journal import Journal
from pipeline.evaluate.generation.local import Local
from pipeline.evaluate.generation.prompts import Question
from pipeline.evaluate.scorers import EVALS, harness, judge, logits
from pipeline.evaluate.scorers.judge import Judge, Judgement
from pipeline.evaluate.subject import Subject
from pipeline.evaluate.transcripts import Transcript
from pipeline.models import loading, losses, source
from pipeline.models.references import ModelRef
from pipeline.models.weights import Weights
from pipeline.runs import artifacts
from pipeline.runs.console import say

PREDICTIONS = "predictions"
"""Directory of the run with what a reference predicted; safe to delete."""

_ASKED = tuple(f"evaluate.generation.{name}" for name in ("max_new_tokens", "temperature", "top_p", "seed"))
_RENDERED = ("data.model_identity", "data.conversation_date")
_DECIDE_SERVED = {
    EndpointApi.completions.name: (*_ASKED, *_RENDERED, "model.path", "model.revision"),  # whose tokenizer it is
    EndpointApi.chat.name: _ASKED,
}
"""What an answer depends on besides the model and the prompt."""
_DECIDE_LOCAL = ("evaluate.generation", "model.dtype", *_RENDERED)
"""Here also on what is in its batch, if only in the last bit of a sum."""
_DECIDE_VERDICT = ("evaluate.judge.max_new_tokens", "evaluate.judge.attempts")
_TOLD = {"validation_loss": "validation loss {:.4f}", "kl_divergence": "divergence from the reference {:.4g}"}
_TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja")


@dataclass(frozen=True)
class Task:
    """What is to be measured.

    Attributes:
        config: the resolved configuration.
        rows: of `data`.
        questions: that models answer; none: they write nothing.
        judge: of the answers, or None.
        suites: of lm-evaluation-harness, or None.
    """

    config: PipelineConfig
    rows: Rows
    questions: list[Question]
    judge: Judge | None
    suites: harness.Suites | None


class _Validation(NamedTuple):
    batches: Sequence[Any]
    groups: Sequence[str]


def prepare(config: PipelineConfig) -> Task:
    """Read what models are measured on, and find the judge: what is wrong there shows before hours are spent.

    Raises:
        UserError: bad rows or prompts, prompts without what scorers need, no such judge or suite of tasks.
    """
    rows = load_rows(config)
    questions = _questions(config, rows)
    if config.evaluate.judge.url is not None and not any("safety" in each.prompt.expected for each in questions):
        raise UserError(
            f"{judge.KEY}.url={config.evaluate.judge.url}: of no prompt it is known whether it is safe, so there is"
            " nothing to judge. Say it of all (+evaluate.prompts.expected_of_all.safety=safe), or name the column that"
            " has it (+evaluate.prompts.expected.safety=<column>)."
        )
    suites = harness.Suites(config.evaluate.lm_eval) if config.evaluate.lm_eval.tasks else None
    return Task(config, rows, questions, judge.find(config.evaluate.judge), suites)


def check_tokens(refs: Sequence[ModelRef], reference: ModelRef | None) -> None:
    """Check that figures per token can be compared.

    Raises:
        UserError: models that have other tokens than the reference, each with its directory.
    """
    others = [ref for ref in refs if reference and _tokenizer_file(ref) != _tokenizer_file(reference)]
    if not reference or not others:
        return
    vocabulary = load_tokenizer(reference.base).get_vocab()
    wrong = [ref for ref in others if load_tokenizer(ref.base).get_vocab() != vocabulary]
    if wrong:
        raise user_errors(
            [
                f"{ref.directory}: its tokenizer has other tokens than that of {reference.directory}, so that losses"
                " and predictions cannot be compared. Evaluate it in a run of its own: another run_dir, with"
                f" evaluate.source={ref.directory}."
                for ref in wrong
            ]
        )


def file_name(name: str) -> str:
    """A model's name, which may be a path, as that of a file."""
    return name.strip("/").replace("/", "_")


class Measure:
    """Asks and scores models, one after the other."""

    def __init__(self, task: Task, directory: Path, reference: ModelRef | None) -> None:
        """
        Args:
            task: what is to be measured.
            directory: of the stage; a model's answers go below it, under its `file_name`.
            reference: the model that weights and predictions are held against; there is one if any model is local.
        """
        self._task = task
        self._config = task.config
        self._directory = directory
        self._reference = reference
        self._validation_of: dict[bytes, _Validation] = {}  # by the bytes of the tokenizer's files

    def figures(self, subject: ModelRef | Served) -> dict[str, float]:
        """All figures of one model."""
        scored = self._served(subject) if isinstance(subject, Served) else self._local(subject)
        figures = {name: value for score in EVALS.values() for name, value in score(scored).items()}
        told = [form.format(figures[name]) for name, form in _TOLD.items() if name in figures]
        answers = [f"{len(scored.transcripts)} answers"] if scored.transcripts else []
        say("evaluate", f"{subject.name}: {', '.join([*told, *answers]) or 'measured'}")
        return figures

    def _served(self, served: Served) -> Subject:
        evaluate, questions = self._config.evaluate, self._task.questions
        decide = artifacts.chosen(self._config, _DECIDE_SERVED[served.api])
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
            judgements=self._judged(served, decide, transcripts),
            suites=self._suites(
                lambda suites: suites.score_served(served, evaluate.endpoint, self._tokenizer_directory)
            ),
        )

    def _local(self, ref: ModelRef) -> Subject:
        assert self._reference is not None
        tokenizer = load_tokenizer(ref.base)
        validation = self._validation(ref, tokenizer)
        predictions = self._predictions(ref, validation.batches)
        model = loading.load_effective(ref, self._dtype)
        rendering = rendering_of(self._config, tokenizer)
        decide = {"evaluate.prompts": prompts.fingerprint(self._task.questions)}
        decide |= artifacts.chosen(self._config, _DECIDE_LOCAL)
        transcripts: list[Transcript] = []
        if self._task.questions:
            journal: Journal[Transcript] = Journal(self._answers_of(ref), {"model": ref.fingerprint, **decide})
            Local(model, rendering, self._config.evaluate.generation).ask(self._task.questions, journal, ref.name)
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
            self._judged(ref, decide, transcripts),
            self._suites(lambda suites: suites.score_model(model, rendering)),
        )

    def _judged(
        self, subject: ModelRef | Served, decide: dict[str, Any], transcripts: list[Transcript]
    ) -> dict[tuple[str, int], Judgement] | None:
        asked, settings = self._task.judge, self._config.evaluate.judge
        if asked is None:
            return None
        inputs = {"model": subject.fingerprint, **decide, "judge": asked.fingerprint}
        inputs |= artifacts.chosen(self._config, _DECIDE_VERDICT)
        journal: Journal[Judgement] = Journal(self._answers_of(subject), inputs, judge.JUDGEMENTS)
        return judge.judge(asked, settings, transcripts, journal, name=subject.name)

    def _suites(self, measure: Callable[[harness.Suites], dict[str, float]]) -> dict[str, float]:
        return measure(self._task.suites) if self._task.suites else {}

    def _predictions(self, ref: ModelRef, batches: Sequence[Any]) -> Path | None:
        """Where the reference's on these batches are, made if need be, before another model is in memory."""
        assert self._reference is not None
        if ref.fingerprint == self._reference.fingerprint:
            return None
        made = logits.fingerprint(self._reference, self._dtype, batches)
        directory = artifacts.stage_dir(self._config, PREDICTIONS) / made
        if not directory.is_dir():
            logits.record(loading.load_effective(self._reference, self._dtype), batches, directory)
            gc.collect()  # modules refer to themselves, and would stay until there is no room for the next
        return directory

    def _validation(self, ref: ModelRef, tokenizer: Any) -> _Validation:
        files = b"".join(path.read_bytes() for name in _TOKENIZER_FILES if (path := ref.base / name).is_file())
        if files not in self._validation_of:
            settings = self._config.evaluate
            splits = prepare_examples(self._config, self._task.rows, tokenizer)
            examples, rows = splits.validation, splits.validation_rows
            count = min(settings.max_samples or len(examples), len(examples))
            batches = losses.batches(examples.select(range(count)), settings.batch_size, tokenizer.pad_token_id)
            of_examples = groups.of_examples(self._config, self._task.rows, rows[:count])
            self._validation_of[files] = _Validation(batches, of_examples)
        return self._validation_of[files]

    def _answers_of(self, subject: ModelRef | Served) -> Path:
        return self._directory / file_name(subject.name)

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self._config.model.dtype.name)

    @cached_property
    def _tokenizer_directory(self) -> Path:
        """Of model.path: a server's own cannot be seen."""
        return source.without_weights(self._config)

    @cached_property
    def _rendering(self) -> Any:
        return rendering_of(self._config, load_tokenizer(self._tokenizer_directory))


def _questions(config: PipelineConfig, rows: Rows) -> list[Question]:
    if not config.evaluate.generate:
        return []
    loaded = prompts.load(config, rows)
    check((prompt.prompt_id, prompt.expected) for prompt in loaded)
    return prompts.questions(loaded, config.evaluate.generation.samples)


def _tokenizer_file(ref: ModelRef) -> bytes:
    path = ref.base / _TOKENIZER_FILES[0]
    return path.read_bytes() if path.is_file() else b""
