"""evaluate: figures of one model of the run, of a directory, or of every model of the run, kept side by side."""

import json
from pathlib import Path
from typing import Any

import torch

from pipeline import artifacts, data, losses, models
from pipeline.artifacts import Artifact, Kind, Result, is_complete, write_json
from pipeline.checkpoints import load_tokenizer
from pipeline.config import PipelineConfig, Stage
from pipeline.data import Rows
from pipeline.errors import UserError
from pipeline.evals import EVALS
from pipeline.evals.subject import Subject
from pipeline.models import MODEL_STAGES, ModelRef, Weights
from pipeline.tracking import log_metrics, say

_SETTINGS = ("data", "model.dtype", "evaluate.max_samples", "evaluate.batch_size")
_ALL = "all"
_TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja")


def run(config: PipelineConfig) -> Artifact:
    """Add the figures of `evaluate.source` to <run_dir>/evaluate, next to those measured before."""
    subjects = {ref.name: ref for ref in (*_measured_before(config), *_asked_for(config))}
    rows = data.load_rows(config)
    return artifacts.build(
        config,
        Stage.evaluate,
        _SETTINGS,
        {name: ref.fingerprint for name, ref in subjects.items()},
        lambda directory: _evaluate(config, list(subjects.values()), rows, directory),
        data=rows.fingerprint,
        is_report=True,
    )


def _asked_for(config: PipelineConfig) -> list[ModelRef]:
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


def _measured_before(config: PipelineConfig) -> list[ModelRef]:
    """Stages of this run that an earlier report has; each is measured again only if it changed."""
    if not is_complete(config, Stage.evaluate):
        return []
    names = artifacts.require(config, Stage.evaluate).parents
    there = [
        artifacts.load(artifacts.stage_dir(config, stage.name))
        for stage in MODEL_STAGES
        if stage.name in names and models.is_loadable(config, stage)
    ]
    return [models.of_artifact(artifact) for artifact in there if artifacts.staleness(config, artifact) is None]


def _evaluate(config: PipelineConfig, subjects: list[ModelRef], rows: Rows, directory: Path) -> Result:
    results = {}
    key = {"settings": artifacts.chosen(config, _SETTINGS), "data": rows.fingerprint}
    reference = _reference(config, subjects)
    prepared: dict[bytes, list[Any]] = {}
    for ref in subjects:
        path = directory / f"{ref.name.strip('/').replace('/', '_')}.json"
        inputs = {**key, "model": ref.fingerprint, "reference": reference.fingerprint}
        figures = _kept(path, inputs)
        if figures is None:
            files = [ref.base / name for name in _TOKENIZER_FILES]
            tokenizer_files = b"".join(path.read_bytes() for path in files if path.is_file())
            if tokenizer_files not in prepared:
                prepared[tokenizer_files] = _batches(config, ref, rows)
            figures = _measure(config, ref, reference, prepared[tokenizer_files])
            write_json(path, {"inputs": inputs, "figures": figures})
            say("evaluate", f"{ref.name}: validation loss {figures['validation_loss']:.4f}")
        log_metrics(directory, {"model": ref.name, **figures})
        results[ref.name] = figures
    return Result(Kind.report, details={"reference": reference.name, "results": results})


def _batches(config: PipelineConfig, ref: ModelRef, rows: Rows) -> list[Any]:
    tokenizer = load_tokenizer(ref.base)
    validation = data.prepare(config, rows, tokenizer).validation
    if config.evaluate.max_samples is not None:
        validation = validation.select(range(min(config.evaluate.max_samples, len(validation))))
    return losses.batches(validation, config.evaluate.batch_size, tokenizer.pad_token_id)


def _measure(config: PipelineConfig, ref: ModelRef, reference: ModelRef, batches: list[Any]) -> dict[str, float]:
    model = models.load_effective(ref, getattr(torch, config.model.dtype.name))
    subject = Subject(ref, model, Weights(ref), Weights(reference), batches)
    return {name: value for score in EVALS.values() for name, value in score(subject).items()}


def _reference(config: PipelineConfig, subjects: list[ModelRef]) -> ModelRef:
    """The model that weight errors are relative to."""
    for stage in (Stage.sft, Stage.upcast):
        if is_complete(config, stage):
            return models.stage_ref(config, stage)
    return subjects[0]


def _kept(path: Path, inputs: dict) -> dict[str, float] | None:
    """Figures measured before of the same model, data and settings."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["figures"] if record["inputs"] == inputs else None
