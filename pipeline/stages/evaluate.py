"""evaluate: measures models of the run, of a directory or of a server, and keeps their figures and answers."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import EvaluateConfig, PipelineConfig, Stage
from pipeline.errors import UserError
from pipeline.evaluate import earlier_answers, measure
from pipeline.evaluate.generation import endpoint, prompts
from pipeline.evaluate.generation.endpoint import Served
from pipeline.evaluate.measure import Measure, Task, file_name
from pipeline.evaluate.scorers import judge
from pipeline.models import references
from pipeline.models.references import ModelRef
from pipeline.runs import controls, exports, passing_over
from pipeline.runs.artifacts import EVALUATED_STAGES, MODEL_STAGES, Artifact, Kind, Result
from pipeline.runs.building import build
from pipeline.runs.commands import advise
from pipeline.runs.console import say, warn
from pipeline.runs.json_files import read_record, seal, write_json
from pipeline.runs.records import EvaluateRecord
from pipeline.runs.run import Run
from pipeline.runs.settings import OWN_TASKS, without_data_paths, without_places
from pipeline.runs.tracking import log_metrics

_JUDGE = tuple(f"{judge.KEY}.{name}" for name in ("max_new_tokens", "attempts", "max_without_verdict"))
_SETTINGS = (
    *("data", "model.dtype", "evaluate.max_samples", "evaluate.batch_size", "evaluate.group_column"),
    *("evaluate.generate", "evaluate.prompts", "evaluate.generation", "evaluate.lm_eval", *_JUDGE),
)
_PROMPTS = "evaluate.prompts"
_ALL = "all"


def run(config: PipelineConfig) -> Artifact:
    """Measure `evaluate.source` and `evaluate.endpoint`. Add their figures to those in <run_dir>/evaluate."""
    config = earlier_answers.keep(config)
    here = Run(config)
    asked_for = _asked_for(here, config.evaluate)
    task = measure.prepare(here, config.data, config.model, config.evaluate)
    for target, reason in exports.find_stale(here).items():
        warn("evaluate", f"export/{target}: skipped, because it is stale: {reason}")
    before: list[ModelRef | Served] = [*_measured_before(here), *_served_before(task)]
    # Servers come first: local models may take hours, and a server's errors should show before that.
    everything = sorted([*before, *asked_for], key=lambda subject: isinstance(subject, ModelRef))
    subjects = list({subject.name: subject for subject in everything}.values())
    refs = [subject for subject in subjects if isinstance(subject, ModelRef)]
    reference = _reference(here, refs)
    measure.check_tokens(refs, reference)
    return build(
        here,
        Stage.evaluate,
        settings=_SETTINGS,
        parents={**{subject.name: subject.fingerprint for subject in subjects}, **_asked(task)},
        work=lambda directory: _evaluate(task, subjects, reference, directory),
        data=task.rows.fingerprint,
        is_report=True,
    )


def _asked(task: Task) -> dict[str, str]:
    """Return fingerprints of the prompts that models answer, of the judge, and of the user's own tasks."""
    found = {_PROMPTS: prompts.fingerprint(task.questions)} if task.questions else {}
    if task.suites is not None and (own_tasks := task.suites.own_fingerprint()) is not None:
        found[OWN_TASKS] = own_tasks
    return found | ({judge.KEY: task.judge.fingerprint} if task.judge else {})


def _asked_for(here: Run, evaluate: EvaluateConfig) -> Sequence[ModelRef | Served]:
    served = [] if evaluate.endpoint.url is None else [endpoint.find(evaluate.endpoint)]
    return served if served and evaluate.source is None else [*_refs(here, evaluate.source), *served]


def _refs(here: Run, source: str | None) -> list[ModelRef]:
    if source != _ALL:
        return [references.find(here, source, EVALUATED_STAGES, "evaluate.source")]
    complete = [stage for stage in EVALUATED_STAGES if references.is_loadable(here, stage)]
    if not complete:
        here.raise_if_absent()
        raise UserError(
            f"evaluate.source={_ALL}: {here.config.run_dir} has no model yet. {advise(here.command(Stage.upcast))}"
        )
    if (adapters := here.config.quantize.adapters) is not None and Stage.sft not in complete:
        warn("evaluate", f"{Stage.sft.name}: skipped, because quantize.source={adapters} holds no adapters.")
    for each in passing_over.find_unfinished(here, EVALUATED_STAGES, models_only=True):
        warn("evaluate", f"{each.name}: skipped, because it is unfinished. Finish it: {each.command}")
    stages = [references.stage_ref(here, stage) for stage in complete if stage is not Stage.export]
    stages += references.export_refs(here)
    for made in controls.find_made(here):
        if made.staleness is not None:
            warn("evaluate", f"{made.model}: skipped, because it is stale: {made.staleness}. {controls.remedy(made)}")
    return [*stages, *_controls(here)]


def _controls(here: Run, among: Container[str] | None = None) -> Iterator[ModelRef]:
    """Yield the models of the run's complete controls, except stale ones. `among`: names of models, or None for all."""
    for made in controls.find_made(here):
        if made.staleness is None and (among is None or made.model in among):
            made.check_files()
            yield replace(references.of_artifact(made.artifact), name=made.model)


def _measured_before(here: Run) -> list[ModelRef]:
    """List the models in the earlier report that are not stale. Only changed models are measured again."""
    names = here.report_parents(Stage.evaluate)
    there = [stage for stage in MODEL_STAGES if stage.name in names and references.is_loadable(here, stage)]
    stages = [ref for ref in (references.ref_unless_stale(here, stage) for stage in there) if ref is not None]
    exported = [ref for ref in references.export_refs(here) if ref.name in names]
    return [*stages, *exported, *_controls(here, names)]


def _served_before(task: Task) -> list[Served]:
    """List the served models in the earlier report whose inputs have not changed. Their servers may be gone."""
    here, asked, kept = task.run, task.evaluate.endpoint, []
    directory = here.stage_dir(Stage.evaluate)
    for name in here.report_parents(Stage.evaluate):
        path = directory / f"{file_name(name)}.json"
        record = _read_measured(path)
        if "served" not in record or (name == asked.name and asked.url):
            continue
        served = Served(**record["served"])
        if _are_same(record["inputs"], _inputs(task, served, None)) and not here.overwrite:
            kept.append(served)
        else:
            say(
                "evaluate",
                f"{name}: skipped, because it was measured with other settings. To measure it again, set"
                f" evaluate.endpoint.url={served.url}",
            )
    return kept


def _inputs(task: Task, subject: ModelRef | Served, reference: ModelRef | None) -> dict[str, Any]:
    """Return everything that the figures of a model depend on."""
    return {
        "settings": task.run.settings(_SETTINGS),
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
            write_json(path, seal({"inputs": inputs, "figures": figures, **served}))
        log_metrics(directory, {"model": subject.name, **figures})
        results[subject.name] = figures
    record = EvaluateRecord(reference=reference.name if reference else None, results=results)
    return Result(Kind.report, record)


def _reference(here: Run, refs: list[ModelRef]) -> ModelRef | None:
    """Return the reference: weights and predictions of other models are compared with this model.

    It is the model of `sft` if this stage is complete. Otherwise, it is the model of `upcast` if this stage is
    complete. Otherwise, it is the first of `refs`. If all these are missing, it is None.
    """
    for stage in (Stage.sft, Stage.upcast):
        if references.is_loadable(here, stage):
            return references.stage_ref(here, stage)
    return refs[0] if refs else None


def _kept(path: Path, inputs: dict) -> dict[str, float] | None:
    """Return the figures of an earlier measurement if its inputs were the same, else None."""
    record = _read_measured(path)
    return record["figures"] if record and _are_same(record["inputs"], inputs) else None


def _are_same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether inputs are the same. Data sets, prompts and tasks count by their contents, wherever they are."""
    one, other = (
        {**inputs, "settings": without_data_paths(without_places(inputs["settings"], inputs["asked"]))}
        for inputs in (before, now)
    )
    return one == other


def _read_measured(path: Path) -> dict[str, Any]:
    """Read the figures of an earlier measurement, with their inputs. Without usable ones, return an empty record."""
    try:
        return read_record(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        warn("evaluate", f"{path}: damaged, so the model is measured again ({error})")
        return {}
