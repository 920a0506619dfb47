"""evaluate: figures and answers of a model of the run, of a directory, of a server, or of every stage, side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline import artifacts, data, losses, models
from pipeline.artifacts import Artifact, Kind, Result, is_complete, write_json
from pipeline.checkpoints import load_tokenizer
from pipeline.config import PipelineConfig, Stage
from pipeline.data import Rows
from pipeline.errors import UserError
from pipeline.evals import EVALS, expected
from pipeline.evals.subject import Subject
from pipeline.generation import endpoint, prompts
from pipeline.generation.endpoint import Served
from pipeline.generation.journal import Journal
from pipeline.generation.prompts import Question
from pipeline.models import MODEL_STAGES, ModelRef, Weights
from pipeline.tracking import log_metrics, say
from pipeline.transcripts import Transcript

_SETTINGS = (
    *("data", "model.dtype", "evaluate.max_samples", "evaluate.batch_size"),
    *("evaluate.generate", "evaluate.prompts", "evaluate.generation"),
)
_DECIDE_SERVED = tuple(f"evaluate.generation.{name}" for name in ("max_new_tokens", "temperature", "top_p", "seed"))
"""What an answer depends on besides the model and the prompt."""
_DECIDE_LOCAL = ("evaluate.generation", "model.dtype", "data.model_identity", "data.conversation_date")
"""Here also on what is in its batch, if only in the last bit of a sum."""
_PROMPTS = "evaluate.prompts"
_ALL = "all"
_TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja")


def run(config: PipelineConfig) -> Artifact:
    """Add the figures of `evaluate.source` and `evaluate.endpoint` to <run_dir>/evaluate, next to those from before."""
    asked_for = _asked_for(config)
    rows = data.load_rows(config)
    questions = _questions(config, rows)
    inputs = {_PROMPTS: prompts.fingerprint(questions)} if questions else {}
    before: list[ModelRef | Served] = [*_measured_before(config), *_served_before(config, rows, questions)]
    # Servers first: what is wrong there shows before hours are spent here.
    everything = sorted([*before, *asked_for], key=lambda subject: isinstance(subject, ModelRef))
    subjects = {subject.name: subject for subject in everything}
    return artifacts.build(
        config,
        Stage.evaluate,
        _SETTINGS,
        {**{name: subject.fingerprint for name, subject in subjects.items()}, **inputs},
        lambda directory: _evaluate(config, list(subjects.values()), rows, questions, directory),
        data=rows.fingerprint,
        is_report=True,
    )


def _asked_for(config: PipelineConfig) -> Sequence[ModelRef | Served]:
    served = [] if config.evaluate.endpoint.url is None else [endpoint.find(config.evaluate.endpoint)]
    return served if served and config.evaluate.source is None else [*_refs(config), *served]


def _refs(config: PipelineConfig) -> list[ModelRef]:
    source = config.evaluate.source
    if source != _ALL:
        return [models.find(config, source, MODEL_STAGES, "evaluate.source")]
    complete = [stage for stage in MODEL_STAGES if models.is_loadable(config, stage)]
    if not complete:
        raise UserError(
            f"evaluate.source={_ALL}: {config.run_dir} has no model yet."
            f" Run first: python -m pipeline stage=upcast recipe={config.recipe} run_dir={config.run_dir}"
        )
    return [models.stage_ref(config, stage) for stage in complete]


def _questions(config: PipelineConfig, rows: Rows) -> list[Question]:
    if not config.evaluate.generate:
        return []
    loaded = prompts.load(config, rows)
    expected.check((prompt.prompt_id, prompt.expected) for prompt in loaded)  # before hours of answers
    return prompts.questions(loaded, config.evaluate.generation.samples)


def _measured_before(config: PipelineConfig) -> list[ModelRef]:
    """Stages of this run that an earlier report has; each is measured again only if it changed."""
    names = artifacts.report_parents(config, Stage.evaluate)
    there = [
        artifacts.load(artifacts.stage_dir(config, stage.name))
        for stage in MODEL_STAGES
        if stage.name in names and models.is_loadable(config, stage)
    ]
    return [models.of_artifact(artifact) for artifact in there if artifacts.staleness(config, artifact) is None]


def _served_before(config: PipelineConfig, rows: Rows, questions: list[Question]) -> list[Served]:
    """Models on servers that an earlier report has. They may be gone, so they stay only while nothing has changed."""
    directory = artifacts.stage_dir(config, Stage.evaluate.name)
    kept = []
    for name in artifacts.report_parents(config, Stage.evaluate):
        path = directory / f"{_file_name(name)}.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "served" not in record or (name == config.evaluate.endpoint.name and config.evaluate.endpoint.url):
            continue
        served = Served(**record["served"])
        if record["inputs"] == _inputs(config, rows, questions, served, None) and not config.overwrite:
            kept.append(served)
        else:
            say(
                "evaluate",
                f"{name}: left out, since it was asked otherwise; evaluate.endpoint.url={served.url} asks anew",
            )
    return kept


def _inputs(
    config: PipelineConfig,
    rows: Rows,
    questions: list[Question],
    subject: ModelRef | Served,
    reference: ModelRef | None,
) -> dict[str, Any]:
    """All that a model's figures depend on."""
    return {
        "settings": artifacts.chosen(config, _SETTINGS),
        "data": rows.fingerprint,
        "prompts": prompts.fingerprint(questions),
        "model": subject.fingerprint,
        "reference": reference.fingerprint if reference and isinstance(subject, ModelRef) else None,
    }


def _evaluate(
    config: PipelineConfig,
    subjects: Sequence[ModelRef | Served],
    rows: Rows,
    questions: list[Question],
    directory: Path,
) -> Result:
    refs = [subject for subject in subjects if isinstance(subject, ModelRef)]
    reference = _reference(config, refs)
    measure = _Measure(config, rows, questions, directory, reference)
    results = {}
    for subject in subjects:
        path = directory / f"{_file_name(subject.name)}.json"
        inputs = _inputs(config, rows, questions, subject, reference)
        figures = _kept(path, inputs)
        if figures is None:
            figures = measure.figures(subject)
            served = {"served": vars(subject)} if isinstance(subject, Served) else {}
            write_json(path, {"inputs": inputs, "figures": figures, **served})
        log_metrics(directory, {"model": subject.name, **figures})
        results[subject.name] = figures
    details = {"reference": reference.name if reference else None, "results": results}
    return Result(Kind.report, details=details)


class _Measure:
    """Asks and scores models, one after the other; what they have in common is prepared once."""

    def __init__(
        self,
        config: PipelineConfig,
        rows: Rows,
        questions: list[Question],
        directory: Path,
        reference: ModelRef | None,
    ) -> None:
        self._config = config
        self._rows = rows
        self._questions = questions
        self._directory = directory
        self._reference = reference
        self._batches: dict[bytes, Sequence[Any]] = {}  # by the bytes of the tokenizer's files

    def figures(self, subject: ModelRef | Served) -> dict[str, float]:
        """All figures of one model."""
        scored = self._served(subject) if isinstance(subject, Served) else self._local(subject)
        figures = {name: value for score in EVALS.values() for name, value in score(scored).items()}
        loss = [f"validation loss {figures['validation_loss']:.4f}"] if "validation_loss" in figures else []
        answers = [f"{len(scored.transcripts)} answers"] if scored.transcripts else []
        say("evaluate", f"{subject.name}: {', '.join(loss + answers)}")
        return figures

    def _served(self, served: Served) -> Subject:
        evaluate = self._config.evaluate
        journal = self._journal(served, artifacts.chosen(self._config, _DECIDE_SERVED))
        endpoint.ask(served, evaluate.endpoint, evaluate.generation, self._questions, journal)
        return Subject(None, None, None, None, [], journal.transcripts(self._questions))

    def _local(self, ref: ModelRef) -> Subject:
        assert self._reference is not None
        tokenizer = load_tokenizer(ref.base)
        batches = self._validation(ref, tokenizer)
        model = models.load_effective(ref, getattr(torch, self._config.model.dtype.name))
        transcripts = self._answers(ref, model, tokenizer) if self._questions else []
        return Subject(ref, model, Weights(ref), Weights(self._reference), batches, transcripts)

    def _answers(self, ref: ModelRef, model: Any, tokenizer: Any) -> list[Transcript]:
        from pipeline.generation.local import Local

        decide = {_PROMPTS: prompts.fingerprint(self._questions)} | artifacts.chosen(self._config, _DECIDE_LOCAL)
        journal = self._journal(ref, decide)
        local = Local(model, data.rendering(self._config, tokenizer), self._config.evaluate.generation)
        local.ask(self._questions, journal, ref.name)
        return journal.transcripts(self._questions)

    def _journal(self, subject: ModelRef | Served, decide: dict[str, Any]) -> Journal:
        return Journal(self._directory / _file_name(subject.name), {"model": subject.fingerprint, **decide})

    def _validation(self, ref: ModelRef, tokenizer: Any) -> Sequence[Any]:
        files = [ref.base / name for name in _TOKENIZER_FILES]
        tokenizer_files = b"".join(path.read_bytes() for path in files if path.is_file())
        if tokenizer_files not in self._batches:
            settings = self._config.evaluate
            examples = data.prepare(self._config, self._rows, tokenizer).validation
            if settings.max_samples is not None:
                examples = examples.select(range(min(settings.max_samples, len(examples))))
            self._batches[tokenizer_files] = losses.batches(examples, settings.batch_size, tokenizer.pad_token_id)
        return self._batches[tokenizer_files]


def _file_name(name: str) -> str:
    """A model's name, which may be a path, as that of a file."""
    return name.strip("/").replace("/", "_")


def _reference(config: PipelineConfig, refs: list[ModelRef]) -> ModelRef | None:
    """The model that weight errors are relative to, if there is any but on servers."""
    for stage in (Stage.sft, Stage.upcast):
        if is_complete(config, stage):
            return models.stage_ref(config, stage)
    return refs[0] if refs else None


def _kept(path: Path, inputs: dict) -> dict[str, float] | None:
    """Figures measured before of the same model, data and settings."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["figures"] if record["inputs"] == inputs else None
