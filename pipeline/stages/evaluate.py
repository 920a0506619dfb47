"""evaluate: measures models of the run, of a directory or of a server, and keeps their figures and answers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import PipelineConfig, Stage
from pipeline.errors import UserError
from pipeline.evaluate import measure
from pipeline.evaluate.generation import endpoint, prompts
from pipeline.evaluate.generation.endpoint import Served
from pipeline.evaluate.measure import Measure, Task, file_name
from pipeline.evaluate.scorers import judge
from pipeline.models import references
from pipeline.models.references import ModelRef
from pipeline.runs import artifacts
from pipeline.runs.artifacts import EVALUATED_STAGES, Artifact, Kind, Result, is_complete, write_json
from pipeline.runs.commands import stage_command
from pipeline.runs.console import say
from pipeline.runs.tracking import log_metrics

_JUDGE = tuple(f"{judge.KEY}.{name}" for name in ("max_new_tokens", "attempts", "max_without_verdict"))
_SETTINGS = (
    *("data", "model.dtype", "evaluate.max_samples", "evaluate.batch_size", "evaluate.group_column"),
    *("evaluate.generate", "evaluate.prompts", "evaluate.generation", "evaluate.lm_eval", *_JUDGE),
)
_PROMPTS = "evaluate.prompts"
_ALL = "all"


def run(config: PipelineConfig) -> Artifact:
    """Add the figures of `evaluate.source` and `evaluate.endpoint` to <run_dir>/evaluate, and keep earlier figures."""
    asked_for = _asked_for(config)
    task = measure.prepare(config)
    before: list[ModelRef | Served] = [*_measured_before(config), *_served_before(task)]
    # Servers come first, so that their errors show before local models take hours.
    everything = sorted([*before, *asked_for], key=lambda subject: isinstance(subject, ModelRef))
    subjects = list({subject.name: subject for subject in everything}.values())
    refs = [subject for subject in subjects if isinstance(subject, ModelRef)]
    reference = _reference(config, refs)
    measure.check_tokens(refs, reference)
    return artifacts.build(
        config,
        Stage.evaluate,
        settings=_SETTINGS,
        parents={**{subject.name: subject.fingerprint for subject in subjects}, **_asked(task)},
        work=lambda directory: _evaluate(task, subjects, reference, directory),
        data=task.rows.fingerprint,
        is_report=True,
    )


def _asked(task: Task) -> dict[str, str]:
    """Fingerprints of the prompts that models answer, and of the judge of the answers."""
    found = {_PROMPTS: prompts.fingerprint(task.questions)} if task.questions else {}
    return found | ({judge.KEY: task.judge.fingerprint} if task.judge else {})


def _asked_for(config: PipelineConfig) -> Sequence[ModelRef | Served]:
    served = [] if config.evaluate.endpoint.url is None else [endpoint.find(config.evaluate.endpoint)]
    return served if served and config.evaluate.source is None else [*_refs(config), *served]


def _refs(config: PipelineConfig) -> list[ModelRef]:
    source = config.evaluate.source
    if source != _ALL:
        return [references.find(config, source, EVALUATED_STAGES, "evaluate.source")]
    complete = [stage for stage in EVALUATED_STAGES if references.is_loadable(config, stage)]
    if not complete:
        raise UserError(
            f"evaluate.source={_ALL}: {config.run_dir} has no model yet."
            f" Run first: {stage_command(Stage.upcast, run_dir=config.run_dir, recipe=config.recipe)}"
        )
    return [references.stage_ref(config, stage) for stage in complete]


def _measured_before(config: PipelineConfig) -> list[ModelRef]:
    """Stages of this run in the earlier report that are not stale. Only changed stages are measured again."""
    names = artifacts.report_parents(config, Stage.evaluate)
    there = [
        artifacts.load(artifacts.stage_dir(config, stage.name))
        for stage in EVALUATED_STAGES
        if stage.name in names and references.is_loadable(config, stage)
    ]
    return [references.of_artifact(artifact) for artifact in there if artifacts.staleness(config, artifact) is None]


def _served_before(task: Task) -> list[Served]:
    """Served models in the earlier report. A server may be gone, so its figures stay only while no input changes."""
    config, kept = task.config, []
    directory = artifacts.stage_dir(config, Stage.evaluate.name)
    for name in artifacts.report_parents(config, Stage.evaluate):
        path = directory / f"{file_name(name)}.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "served" not in record or (name == config.evaluate.endpoint.name and config.evaluate.endpoint.url):
            continue
        served = Served(**record["served"])
        if record["inputs"] == _inputs(task, served, None) and not config.overwrite:
            kept.append(served)
        else:
            say(
                "evaluate",
                f"{name}: skipped, because its answers used other settings. To ask again, set"
                f" evaluate.endpoint.url={served.url}",
            )
    return kept


def _inputs(task: Task, subject: ModelRef | Served, reference: ModelRef | None) -> dict[str, Any]:
    """Everything that a model's figures depend on."""
    return {
        "settings": artifacts.chosen(task.config, _SETTINGS),
        "data": task.rows.fingerprint,
        "asked": _asked(task),
        "model": subject.fingerprint,
        "reference": reference.fingerprint if reference and isinstance(subject, ModelRef) else None,
    }


def _evaluate(task: Task, subjects: Sequence[ModelRef | Served], reference: ModelRef | None, directory: Path) -> Result:
    measured, results = Measure(task, directory, reference), {}
    for subject in subjects:
        path = directory / f"{file_name(subject.name)}.json"
        inputs = _inputs(task, subject, reference)
        figures = _kept(path, inputs)
        if figures is None:
            figures = measured.figures(subject)
            served = {"served": vars(subject)} if isinstance(subject, Served) else {}
            write_json(path, {"inputs": inputs, "figures": figures, **served})
        log_metrics(directory, {"model": subject.name, **figures})
        results[subject.name] = figures
    details = {"reference": reference.name if reference else None, "results": results}
    return Result(Kind.report, details=details)


def _reference(config: PipelineConfig, refs: list[ModelRef]) -> ModelRef | None:
    """The model that weights and predictions are compared with, or None if all models are on servers."""
    for stage in (Stage.sft, Stage.upcast):
        if is_complete(config, stage):
            return references.stage_ref(config, stage)
    return refs[0] if refs else None


def _kept(path: Path, inputs: dict) -> dict[str, float] | None:
    """Earlier figures of the same model, data and settings, or None."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["figures"] if record["inputs"] == inputs else None
