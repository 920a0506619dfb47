"""Find evaluated runs, read their stages, and check that their figures are comparable."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import xxhash

from pipeline.compare.names import distinct_endings
from pipeline.config import PipelineConfig, Stage
from pipeline.config.controls import is_control
from pipeline.errors import user_errors
from pipeline.runs import artifacts, compared, exports
from pipeline.runs.artifacts import (
    ARTIFACT_FILE,
    EVALUATED_STAGES,
    MODEL_STAGES,
    Artifact,
)
from pipeline.runs.compared import evaluate_command
from pipeline.runs.exports import Export
from pipeline.runs.paths import absolute
from pipeline.runs.run import Run
from pipeline.runs.yaml_files import value_at

_EVALUATE = Stage.evaluate.name
_MADE_ON = ("git_commit", "libraries", "python", "device", "processes")
_SHARED = "base_run"  # setting that names another run, whose stages this run uses


@dataclass(frozen=True)
class StageFacts:
    """The artifact and the cost of a complete stage.

    Attributes:
        artifact: the stage's artifact.
        seconds: duration of the stage.
        peak_bytes: peak memory of the stage's main process: GPU memory if it has a GPU, else host memory.
        is_gpu_memory: whether `peak_bytes` is GPU memory.
        made_on: commit of the program, versions and device, as `runs.provenance` recorded them, by name.
    """

    artifact: Artifact
    seconds: float
    peak_bytes: int
    is_gpu_memory: bool = False
    made_on: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluatedRun:
    """A run that `evaluate` has measured.

    Attributes:
        label: short name, different from the labels of the other runs.
        directory: directory of the run.
        evaluated: artifact of the run's `evaluate` stage.
    """

    label: str
    directory: Path
    evaluated: Artifact

    def stage_dir(self, stage: str) -> Path | None:
        """Return the directory of a complete stage, or None. A control's model names its stage by a path.

        The stage may be in the run that `base_run` names. A stage of that run is ignored if it was rebuilt after this
        run was evaluated.
        """
        if exports.is_export(stage):
            export = self.exports.get(stage)
            return None if export is None else export.artifact.directory
        if (self.directory / stage / ARTIFACT_FILE).is_file():
            return self.directory / stage
        shared = None if self._shared is None else absolute(self._shared) / stage
        if shared is None or not (shared / ARTIFACT_FILE).is_file():
            return None
        fingerprint = artifacts.load(shared, check_files=False).fingerprint
        return shared if self.evaluated.parents.get(stage, fingerprint) == fingerprint else None

    def read_stage(self, stage: str) -> StageFacts | None:
        """Read artifact.json of a stage, or return None if the stage is not complete.

        Raises:
            UserError: artifact.json is not readable.
        """
        directory = self.stage_dir(stage)
        return None if directory is None else read_facts(directory)

    def read_control(self, model: str) -> StageFacts | None:
        """Read the stage of a control's model. The cost covers all stages that the control ran itself."""
        made = self.read_stage(model)
        if made is None:
            return None
        own = [stage for stage in MODEL_STAGES if not made.artifact.directory.with_name(stage.name).is_symlink()]
        names = [PurePosixPath(model).with_name(stage.name).as_posix() for stage in own]
        facts = [each for each in map(self.read_stage, names) if each is not None]
        most = max(facts, key=lambda each: each.peak_bytes)
        seconds = sum(each.seconds for each in facts)
        return StageFacts(made.artifact, seconds, most.peak_bytes, most.is_gpu_memory, made.made_on)

    @cached_property
    def exports(self) -> dict[str, Export]:
        """The complete exports by their names in reports (`exports.by_name`), except stale ones."""
        return {name: export for name, export in self._all_exports.items() if name not in self.stale_exports}

    @cached_property
    def stale_exports(self) -> dict[str, str]:
        """The exports whose model was rebuilt later: name -> message with the command that rebuilds it."""
        here = Run(PipelineConfig(stage=Stage.compare, run_dir=str(self.directory)))
        found = {name: here.staleness(export.artifact) for name, export in self._all_exports.items()}
        return {name: message for name, message in found.items() if message is not None}

    @cached_property
    def _all_exports(self) -> dict[str, Export]:
        own = exports.by_name(self.directory)
        return own if own or self._shared is None else exports.by_name(absolute(self._shared))

    @cached_property
    def _shared(self) -> str | None:
        return value_at(artifacts.read_config(self.directory / _EVALUATE), _SHARED)


def distinct_runs(runs: list[EvaluatedRun], stage: str) -> list[tuple[EvaluatedRun, str]]:
    """Return the runs to show for a stage, each with a prefix for names. Only runs with the complete stage count.

    Several runs may share the directory of a stage. Such a stage is shown once, for the first of these runs.
    """
    found = {run.stage_dir(stage): run for run in reversed(runs) if run.stage_dir(stage) is not None}
    return [(run, f"{run.label}: " if len(found) > 1 else "") for run in runs if found.get(run.stage_dir(stage)) is run]


def read_facts(directory: Path) -> StageFacts:
    """Read artifact.json in the directory of a complete stage.

    Raises:
        UserError: artifact.json is not readable.
    """
    cost = json.loads((directory / ARTIFACT_FILE).read_text(encoding="utf-8"))
    on_gpu = cost["peak_device_memory_bytes"]
    peak_bytes = on_gpu or cost["peak_memory_bytes"]
    made_on = {name: cost[name] for name in _MADE_ON if name in cost}
    artifact = artifacts.load(directory, check_files=False)
    return StageFacts(artifact, cost["seconds"], peak_bytes, bool(on_gpu), made_on)


def find_this(evaluated: Artifact) -> list[EvaluatedRun]:
    """Return a list with one element: the run of this evaluate artifact.

    Raises:
        UserError: a model was rebuilt after its evaluation.
    """
    run = EvaluatedRun(evaluated.directory.parent.name, evaluated.directory.parent, evaluated)
    if problems := _stale_problems(run):
        raise user_errors(problems)
    return [run]


def find(patterns: list[str]) -> list[EvaluatedRun]:
    """Find the runs that are listed in compare.runs.

    Args:
        patterns: entries of compare.runs. Each is a run directory, its evaluate directory, or a pattern that matches
            such directories.

    Raises:
        UserError: some directories are not runs, are not evaluated, or are named twice. If all directories pass, a
            second check can fail: models were rebuilt after their evaluation, or the runs are not comparable. Each
            error lists all problems that its check found.
    """
    directories, problems = compared.find_directories(patterns)
    if problems:
        raise user_errors(problems)
    labels = distinct_endings(directories)
    found = [
        EvaluatedRun(labels[directory], directory, artifacts.load(directory / _EVALUATE)) for directory in directories
    ]
    problems = [problem for run in found for problem in _stale_problems(run)] + _mixture_problems(found)
    if problems:
        raise user_errors(problems)
    return found


def _stale_problems(run: EvaluatedRun) -> list[str]:
    """Return a message for each model whose figures are stale, because it was rebuilt after its evaluation."""
    return [
        f"{directory}: was rebuilt after it was evaluated. Run {evaluate_command(run.directory)}"
        for model, fingerprint in run.evaluated.parents.items()
        if (model in Stage.__members__ or exports.is_export(model) or is_control(model))
        and (directory := run.stage_dir(model)) is not None
        and artifacts.load(directory, check_files=False).fingerprint != fingerprint
    ] + [
        f"{message}. Or leave it out of the report: {evaluate_command(run.directory)}"
        for model, message in run.stale_exports.items()
        if model in run.evaluated.parents
    ]


# --- properties that comparable runs share ----------------------------------------------------------------------------

_TOKENIZER = "tokenizer.json"
_SETTINGS = (
    *(f"data.{name}" for name in ("max_samples", "validation_fraction", "seed", "max_length", "supervise")),
    *(
        f"data.{name}"
        for name in ("reasoning_effort", "reasoning_language", "model_identity", "conversation_date", "rendering")
    ),
    *("model.dtype", "evaluate.max_samples"),
)
"""Settings that affect the figures. Data and models are compared by their fingerprints, not by their settings."""
_ANSWER_SETTINGS = tuple(
    f"evaluate.generation.{name}" for name in ("max_new_tokens", "temperature", "top_p", "samples")
)
"""Settings that affect the figures of answers, such as pass rates."""

_Property: TypeAlias = "tuple[str, str] | None"
"""A property of a run as (value to compare, text to show), or None if it is unknown."""


def _data(run: EvaluatedRun) -> _Property:
    data = run.evaluated.data
    return None if data is None else (data, f"{run.evaluated.settings.get('data.path')}, fingerprint {data}")


def _prompts(run: EvaluatedRun) -> _Property:
    prompts = run.evaluated.parents.get("evaluate.prompts") if has_answers(run) else None
    return None if prompts is None else (prompts, f"fingerprint {prompts}")


def _base(run: EvaluatedRun) -> _Property:
    name = run.evaluated.base_model
    shown = name["path"] + (f" at revision {name['revision']}" if name["revision"] else "")
    return shown, shown


def _base_contents(run: EvaluatedRun) -> _Property:
    """Return the fingerprint of the base checkpoint, because runs may name the same checkpoint by different paths.

    Only the upcast stage records this fingerprint.
    """
    upcast, base = run.read_stage(Stage.upcast.name), _base(run)
    if upcast is None or base is None:
        return None
    source = upcast.artifact.parents["source"]
    return source, f"{base[1]} ({source})"


def _tokenizer(run: EvaluatedRun) -> _Property:
    for stage in EVALUATED_STAGES:
        directory = run.stage_dir(stage.name)
        if directory is not None and (directory / _TOKENIZER).is_file():
            digest = xxhash.xxh3_128_hexdigest((directory / _TOKENIZER).read_bytes())
            return digest, f"fingerprint {digest}"
    return None


def has_answers(run: EvaluatedRun) -> bool:
    """Return whether the models of a run answered prompts."""
    return bool(run.evaluated.settings.get("evaluate.generate"))


def _setting(key: str) -> Callable[[EvaluatedRun], _Property]:
    def read(run: EvaluatedRun) -> _Property:
        settings = run.evaluated.settings
        is_used = key in settings and (key not in _ANSWER_SETTINGS or has_answers(run))
        return (repr(settings[key]), f"{key}={settings[key]}") if is_used else None

    return read


_SAME: dict[str, Callable[[EvaluatedRun], _Property]] = {
    "the evaluation data": _data,
    "the prompts": _prompts,
    "the base model": _base_contents,
    "the tokenizer": _tokenizer,
    **{key: _setting(key) for key in (*_SETTINGS, *_ANSWER_SETTINGS)},
}
"""Properties that two runs must share: name -> function that reads the property."""


def _mixture_problems(runs: list[EvaluatedRun]) -> list[str]:
    """Compare each run with the first, and return the reasons why two runs are not comparable."""
    first, *others = runs
    return [problem for other in others for problem in _compare(first, other)]


def _compare(first: EvaluatedRun, other: EvaluatedRun) -> list[str]:
    contents_are_known = None not in (_base_contents(first), _base_contents(other))
    same = _SAME if contents_are_known else {**_SAME, "the base model": _base}
    return [
        f"compare.runs: {first.directory} and {other.directory} cannot be compared. They differ in {name}: {mine[1]}"
        f" and {theirs[1]}. Evaluate both under the same conditions, or compare them separately."
        for name, read in same.items()
        if (mine := read(first)) is not None and (theirs := read(other)) is not None and mine[0] != theirs[0]
    ]
