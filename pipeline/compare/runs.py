"""Evaluated runs: where they are, what they left, and whether their figures can stand in one table."""

import glob
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from pipeline.config import Stage
from pipeline.errors import user_errors
from pipeline.runs import artifacts
from pipeline.runs.artifacts import ARTIFACT_FILE, CONFIG_FILE, EVALUATED_STAGES, UNFINISHED_FILE, Artifact
from pipeline.runs.commands import stage_command

_EVALUATE = Stage.evaluate.name
_SHARED = "base_run"


@dataclass(frozen=True)
class Run:
    """A run that `evaluate` has measured.

    Attributes:
        label: short, and unlike those of the other runs.
        directory: of the run.
        evaluated: its evaluate artifact.
    """

    label: str
    directory: Path
    evaluated: Artifact

    def stage_dir(self, stage: str) -> Path | None:
        """Where a finished stage lies; None without one.

        That is here, or in the run that this one shares stages with, if it is the one that was evaluated.
        """
        if (self.directory / stage / ARTIFACT_FILE).is_file():
            return self.directory / stage
        shared = None if self._shared is None else Path(self._shared).expanduser().absolute() / stage
        if shared is None or not (shared / ARTIFACT_FILE).is_file():
            return None
        fingerprint = artifacts.load(shared, check_files=False).fingerprint
        return shared if self.evaluated.parents.get(stage, fingerprint) == fingerprint else None

    def record(self, stage: str) -> dict[str, Any] | None:
        """What artifact.json says of a finished stage, cost included; None without one."""
        directory = self.stage_dir(stage)
        return None if directory is None else json.loads((directory / ARTIFACT_FILE).read_text(encoding="utf-8"))

    @cached_property
    def _shared(self) -> str | None:
        from omegaconf import OmegaConf

        config = OmegaConf.load(self.directory / _EVALUATE / CONFIG_FILE)
        return OmegaConf.select(config, _SHARED)


def of_this_run(evaluated: Artifact) -> list[Run]:
    """The run alone that an evaluate artifact is of.

    Raises:
        UserError: a model was rebuilt after it was evaluated.
    """
    run = Run(evaluated.directory.parent.name, evaluated.directory.parent, evaluated)
    if problems := _rebuilt(run):
        raise user_errors(problems)
    return [run]


def find(patterns: list[str]) -> list[Run]:
    """The runs that compare.runs names: run directories or their evaluate directories, or patterns of such.

    Raises:
        UserError: what is no run, not evaluated, named twice, or cannot be compared; everything together.
    """
    problems: list[str] = []
    named: dict[Path, str] = {}
    for pattern in patterns:
        directories = _directories(pattern)
        if not directories:
            problems.append(f"compare.runs: {pattern!r}: no such directory, and nothing that it is a pattern of.")
        for directory in directories:
            if directory in named:
                by = f"by {named[directory]!r} and by {pattern!r}" if named[directory] != pattern else f"as {pattern!r}"
                problems.append(f"compare.runs: {directory} is named twice, {by}. Leave one out.")
            elif (problem := _problem(directory)) is not None:
                problems.append(f"compare.runs: {problem}")
            named.setdefault(directory, pattern)
    if problems:
        raise user_errors(problems)
    labels = _labels(list(named))
    found = [Run(labels[directory], directory, artifacts.load(directory / _EVALUATE)) for directory in named]
    problems = [problem for run in found for problem in _rebuilt(run)] + _mixtures(found)
    if problems:
        raise user_errors(problems)
    return found


def _directories(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser().absolute()
    matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path)))]
    return [match.parent if match.name == _EVALUATE else match for match in map(Path.resolve, matches)]


def _problem(directory: Path) -> str | None:
    """Why a directory is not an evaluated run, and what to do."""
    evaluate = directory / _EVALUATE
    if (evaluate / ARTIFACT_FILE).is_file():
        return None
    if (evaluate / UNFINISHED_FILE).is_file():
        return f"{evaluate}: the evaluation is unfinished. Run it again: {_command(directory)}"
    if directory.is_dir() and any((directory / stage.name / ARTIFACT_FILE).is_file() for stage in Stage):
        return f"{directory}: the run was not evaluated. Run first: {_command(directory)}"
    return f"{directory}: not the directory of a run, which holds its stages."


def _rebuilt(run: Run) -> list[str]:
    """Models whose figures are of an earlier build."""
    return [
        f"{directory}: was rebuilt after it was evaluated. Run {_command(run.directory)}"
        for stage in Stage
        if stage.name in run.evaluated.parents
        and (directory := run.stage_dir(stage.name)) is not None
        and artifacts.load(directory, check_files=False).fingerprint != run.evaluated.parents[stage.name]
    ]


def _command(directory: Path) -> str:
    return f"{stage_command(Stage.evaluate, run_dir=str(directory))}, with the run's recipe"


def _labels(directories: list[Path]) -> dict[Path, str]:
    """Names of the directories, and where two have the same, their ways from what they have in common."""
    names = [directory.name for directory in directories]
    if len(set(names)) == len(names):
        return dict(zip(directories, names, strict=True))
    parts = [directory.parts for directory in directories]
    shared = next((i for i, each in enumerate(zip(*parts, strict=False)) if len(set(each)) > 1), min(map(len, parts)))
    return {directory: "/".join(directory.parts[shared:]) or directory.name for directory in directories}


# --- what must be the same ------------------------------------------------------------------------------------------

_TOKENIZER = "tokenizer.json"
_DECIDE = (
    *(f"data.{name}" for name in ("max_samples", "validation_fraction", "seed", "max_length", "supervise")),
    *(f"data.{name}" for name in ("reasoning_effort", "reasoning_language", "model_identity", "conversation_date")),
    *("model.dtype", "evaluate.max_samples"),
)
"""Settings that figures depend on, besides contents, which fingerprints tell."""
_DECIDE_ANSWERS = tuple(f"evaluate.generation.{name}" for name in ("max_new_tokens", "temperature", "top_p", "samples"))

_Told = tuple[str, str] | None
"""What is compared, and how it is shown; None where it is not known."""


def _data(run: Run) -> _Told:
    data = run.evaluated.data
    return None if data is None else (data, f"{run.evaluated.settings.get('data.path')}, fingerprint {data}")


def _prompts(run: Run) -> _Told:
    prompts = run.evaluated.parents.get("evaluate.prompts") if answers_prompts(run) else None
    return None if prompts is None else (prompts, f"fingerprint {prompts}")


def _base(run: Run) -> _Told:
    name = run.evaluated.base_model
    shown = name["path"] + (f" at revision {name['revision']}" if name["revision"] else "")
    return shown, shown


def _base_contents(run: Run) -> _Told:
    """Of the base checkpoint, whatever it is called; only the upcast knows."""
    upcast = run.record(Stage.upcast.name)
    told = _base(run)
    return None if upcast is None or told is None else (source := upcast["parents"]["source"], f"{told[1]} ({source})")


def _tokenizer(run: Run) -> _Told:
    for stage in EVALUATED_STAGES:
        directory = run.stage_dir(stage.name)
        if directory is not None and (directory / _TOKENIZER).is_file():
            digest = xxhash.xxh3_128_hexdigest((directory / _TOKENIZER).read_bytes())
            return digest, f"fingerprint {digest}"
    return None


def answers_prompts(run: Run) -> bool:
    """Whether its models were asked."""
    return bool(run.evaluated.settings.get("evaluate.generate"))


def _setting(key: str) -> Callable[[Run], _Told]:
    def told(run: Run) -> _Told:
        settings = run.evaluated.settings
        is_used = key in settings and (key not in _DECIDE_ANSWERS or answers_prompts(run))
        return (repr(settings[key]), f"{key}={settings[key]}") if is_used else None

    return told


_SAME: dict[str, Callable[[Run], _Told]] = {
    "the evaluation data": _data,
    "the prompts": _prompts,
    "the base model": _base_contents,
    "the tokenizer": _tokenizer,
    **{key: _setting(key) for key in (*_DECIDE, *_DECIDE_ANSWERS)},
}
"""What two runs must have in common."""


def _mixtures(runs: list[Run]) -> list[str]:
    """What keeps runs from standing in one table: each run against the first."""
    first, *others = runs
    return [problem for other in others for problem in _against(first, other)]


def _against(first: Run, other: Run) -> list[str]:
    contents_are_known = None not in (_base_contents(first), _base_contents(other))
    same = _SAME if contents_are_known else {**_SAME, "the base model": _base}
    return [
        f"compare.runs: {first.directory} and {other.directory} cannot be compared: they differ in {what}, {mine[1]}"
        f" and {theirs[1]}. Evaluate both alike, or compare them apart."
        for what, of in same.items()
        if (mine := of(first)) is not None and (theirs := of(other)) is not None and mine[0] != theirs[0]
    ]
