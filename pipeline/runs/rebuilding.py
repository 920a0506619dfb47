"""Check what `stage=all` would discard for `overwrite`, before it discards anything."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.config import PipelineConfig, Stage, list_controls, list_names
from pipeline.config.controls import DIRECTORY as CONTROLS_DIR
from pipeline.config.controls import controls_of, overwrite_problem
from pipeline.errors import UserError
from pipeline.runs import launches, parts
from pipeline.runs.artifacts import ARTIFACT_FILE, CHECKPOINTS_DIR, MODEL_STAGES, UNFINISHED_FILE, load
from pipeline.runs.json_files import read_record
from pipeline.runs.records import ExportRecord
from pipeline.runs.run import START, Run

_MINUTE, _HOUR = 60.0, 3600.0


def check(config: PipelineConfig, stages: Sequence[Stage]) -> None:
    """Check `overwrite` of a command that runs several stages.

    Raises:
        UserError: overwrite=true would discard results, a stage is named that the command does not run, or a stage
            is not named although it is made from one that is named.
    """
    here = Run(config)
    if config.overwrite is True:
        _raise_if_all_would_go(here, stages)
    if not (named := list_names(config.overwrite)):
        return
    _raise_if_not_run(config, named, stages)
    _raise_if_more_must_go(here, named, stages)


def _raise_if_not_run(config: PipelineConfig, named: Sequence[str], stages: Sequence[Stage]) -> None:
    """Raise UserError if a name is no stage or control that the command runs.

    `stage=controls` repeats the check of controls, because it knows whether the source's experts are MXFP4.
    """
    controls = list_controls(config.overwrite)
    missing = [name for name in named if name not in {stage.name for stage in stages} and name not in controls]
    if controls and Stage.controls not in stages:
        missing += controls
    if missing:
        hint = " Add controls=true." if controls and not config.controls else ""
        raise UserError(
            f"overwrite={config.overwrite}: this command does not run {' or '.join(missing)}. It runs"
            f" {', '.join(stage.name for stage in stages)}.{hint}"
        )
    possible = controls_of(config, str(Run(config).stage_dir(Stage.sft)), has_mxfp4=True)
    if (problem := overwrite_problem(config.overwrite, possible)) is not None:
        raise UserError(problem)


def _raise_if_all_would_go(here: Run, stages: Sequence[Stage]) -> None:
    there = [stage for stage in stages if _seconds(here, stage) is not None]
    if there:
        raise UserError(
            f"stage=all overwrite=true: would discard {_described(here, there)} in {here.config.run_dir}. Name the"
            f" stages to rebuild: overwrite=<stage>[,<stage>]. To rebuild all of them:"
            f" overwrite={','.join(stage.name for stage in there)}"
        )


def _raise_if_more_must_go(here: Run, named: Sequence[str], stages: Sequence[Stage]) -> None:
    """Raise UserError if a complete or begun model is made from a named stage, and is not named itself.

    Reports are left out, because they bring themselves up to date.
    """
    going = {stage for stage in stages if stage.name in named}
    if _made_controls(here) <= {*named}:
        going.add(Stage.controls)
    further = [stage for stage in stages if stage in _made_from(here, going) and stage not in going]
    if further:
        every = ",".join(_names(named, [stage for stage in stages if stage in further], stages))
        raise UserError(
            f"overwrite={','.join(named)}: {_described(here, further)} in {here.config.run_dir} would not fit the"
            f" rebuilt {', '.join(named)}. Name these stages, too: overwrite={every}. Or use another run_dir to keep"
            " them."
        )


def _names(named: Sequence[str], further: Sequence[Stage], stages: Sequence[Stage]) -> list[str]:
    """Return the named and the further stages in the order of `stages`, then the named controls."""
    listed = [stage.name for stage in stages if stage.name in named or stage in further]
    if Stage.controls in further:
        return listed
    return [*listed, *(name for name in named if name not in listed)]


def _made_controls(here: Run) -> set[str]:
    """Return the names of the controls that have results which a rebuilt stage of the run would make stale."""
    return {path.parent.parent.name for path in _artifacts_of_controls(here) if _own_seconds(path.parent) is not None}


def _artifacts_of_controls(here: Run) -> Iterator[Path]:
    return (here.directory / CONTROLS_DIR).glob(f"*/*/{ARTIFACT_FILE}")


def _made_from(here: Run, going: set[Stage]) -> set[Stage]:
    """Return the models and controls that are made from some stages, directly or through others."""
    found = set(going)
    for stage in (*MODEL_STAGES, Stage.export):
        if stage not in going and _seconds(here, stage) is not None and found & _parents(here, stage):
            found.add(stage)
    if found & {Stage.upcast, Stage.sft} and _seconds(here, Stage.controls) is not None:
        found.add(Stage.controls)
    return found


def _parents(here: Run, stage: Stage) -> set[Stage]:
    """Return the stages of the run that a model was made from."""
    directory = here.stage_dir(stage)
    if stage is Stage.export:
        source = _exported_from(directory)
        return {Stage[source]} if source in Stage.__members__ else set()
    if (directory / ARTIFACT_FILE).is_file():
        parents = load(directory, check_files=False).parents
    else:
        parents = (here.read_unfinished(directory) or {"parents": {}})["parents"]
    return {Stage[name] for name in parents if name in Stage.__members__ and name != START}


def _exported_from(directory: Path) -> str:
    """Return the name of the exported stage. An unfinished export does not record it, and may be of any."""
    if not (directory / ARTIFACT_FILE).is_file():
        return MODEL_STAGES[-1].name
    return load(directory, check_files=False).read(ExportRecord).exported_from


def _described(here: Run, stages: Sequence[Stage]) -> str:
    """List stages with the time that they took. Example: `upcast (3 s), sft (4.2 h), qat (unfinished)`."""
    return ", ".join(f"{stage.name} ({_duration(_seconds(here, stage))})" for stage in stages)


def _duration(seconds: float | None) -> str:
    if not seconds:
        return "unfinished"
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s" if seconds >= 1 else "below 1 s"
    return f"{seconds / _MINUTE:.0f} min" if seconds < 2 * _HOUR else f"{seconds / _HOUR:.1f} h"


def _seconds(here: Run, stage: Stage) -> float | None:
    """Return the time that a stage took: 0 if it is unfinished, and None if there is nothing to lose.

    Only the run's own stages count. A stage in `base_run` is never rebuilt, and neither is one that the present launch
    has begun.
    """
    if stage is Stage.controls:
        made = [_own_seconds(path.parent) for path in _artifacts_of_controls(here)]
        lost = [each for each in made if each is not None]
        return sum(lost) if lost else None
    return _own_seconds(here.stage_dir(stage) if stage.name in parts.STAGES else here.directory / stage.name)


def _own_seconds(directory: Path) -> float | None:
    written = any(launches.has_written(directory / name) for name in (ARTIFACT_FILE, UNFINISHED_FILE))
    if directory.is_symlink() or written:
        return None
    if (directory / ARTIFACT_FILE).is_file():
        try:
            return float(read_record(directory / ARTIFACT_FILE)["seconds"]) or 0.001
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return 0.001  # a damaged stage counts, because rebuilding it may be what the user wants
    has_work = (directory / UNFINISHED_FILE).is_file() and (directory / CHECKPOINTS_DIR).is_dir()
    return 0.0 if has_work else None
