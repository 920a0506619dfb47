"""The directories of controls: `<run_dir>/controls/<name>` is a run with links to stages of the main run."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config import Stage
from pipeline.config.controls import CONTROL_FILE, DIRECTORY, Control, controls_of
from pipeline.errors import UserError
from pipeline.runs.artifacts import ARTIFACT_FILE, Artifact, load
from pipeline.runs.commands import run_command
from pipeline.runs.json_files import read_record, seal, write_json
from pipeline.runs.processes import is_main_process, wait_for_everyone
from pipeline.runs.run import DATA_DIR, PREDICTIONS_DIR, SOURCE_DIR, START, Run
from pipeline.runs.settings import choose_settings

_SHARED = (SOURCE_DIR, DATA_DIR, PREDICTIONS_DIR)
_NOT_MADE = "a run with these settings has no such control"


@dataclass(frozen=True)
class Made:
    """A complete control.

    Attributes:
        model: name of its model in the results, as `Control.model`.
        artifact: the stage that made the model.
        staleness: the reason why its figures do not fit the main run, or None: a stage was rebuilt, or settings differ.
    """

    model: str
    artifact: Artifact
    staleness: str | None

    def check_files(self) -> None:
        """Raise UserError if a file of the model is missing or has another size."""
        load(self.artifact.directory, remedy=remedy_of(self.artifact.directory))


def remedy(made: Made) -> str:
    """Return the advice for a control that is stale: make all its stages again, or go on without it."""
    directory = made.artifact.directory.parent
    if made.staleness == _NOT_MADE:
        return f"To go on without it, delete {directory}."
    return _advise(directory, run_command(Stage.controls, str(directory), "overwrite=true"))


def remedy_of(stage: Path) -> str:
    """Return the advice for a directory of a control's stage that is damaged: make it again, or go on without it."""
    first = Stage.__members__.get(stage.name, Stage.controls)
    return _advise(stage.parent, run_command(first, str(stage.parent), "overwrite=true"))


def _advise(directory: Path, command: str) -> str:
    return f"Make it again: {command}. To go on without it, delete {directory}."


def prepare(main: Run, control: Control, stages: Iterable[Stage]) -> None:
    """Make the control's directory, with links to the stages of the main run that the control does not run itself.

    A link that is left from other settings is removed if the control runs that stage itself. Otherwise, the control
    would write into the main run.

    Args:
        main: the main run. Its `upcast` and `sft` are complete.
        control: the control.
        stages: the stages that the control runs itself.
    """
    wait_for_everyone()
    if is_main_process():
        directory = main.directory / DIRECTORY / control.name
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for stage in stages:
                if (directory / stage.name).is_symlink():
                    (directory / stage.name).unlink()
            linked = [stage.name for stage in (Stage.upcast, Stage.sft) if stage not in stages]
            for name in (*linked, *_SHARED):
                _link(directory / name, main.stage_dir(name))
            write_json(directory / CONTROL_FILE, seal({"stage": control.stages[-1].name}))
        except OSError as error:
            raise main.not_writable(directory, error) from error
    wait_for_everyone()


def _link(path: Path, target: Path) -> None:
    if path.is_symlink():
        path.unlink()
    if target.is_dir() and not path.exists():
        there = target.parent.resolve() / target.name
        path.symlink_to(os.path.relpath(there, path.parent.resolve()), target_is_directory=True)


def find_made(main: Run) -> Iterator[Made]:
    """Find the complete controls of a run, in the order of their names. Files of their models are not checked."""
    for file in sorted((main.directory / DIRECTORY).glob(f"*/{CONTROL_FILE}")):
        stage = _read_stage(file)
        directory = file.parent / stage
        if (directory / ARTIFACT_FILE).is_file():
            artifact = load(directory, check_files=False, remedy=remedy_of(directory))
            yield Made(f"{DIRECTORY}/{file.parent.name}/{stage}", artifact, _staleness(main, artifact))


def _read_stage(file: Path) -> str:
    """Read the name of the stage that makes a control's model from control.json."""
    try:
        return Stage[read_record(file)["stage"]].name
    except (OSError, ValueError, KeyError, TypeError) as error:
        advice = _advise(file.parent, run_command(Stage.controls, str(file.parent)))  # every command writes the file
        raise UserError(f"{file}: not readable ({error!r}). {advice}") from error


def _staleness(main: Run, artifact: Artifact) -> str | None:
    """Return the reason why a control is stale, or None.

    The model that more SFT started from is not checked if the main run's `sft` was removed to save space.
    """
    directory = artifact.directory.parent
    own = Run(replace(main.config, run_dir=str(directory), base_run=None))
    if own.staleness(artifact) is not None:
        return "a stage that it was made from was rebuilt later"
    if main.is_complete(Stage.sft) and own.is_complete(Stage.sft):
        now = load(main.stage_dir(Stage.sft), check_files=False).fingerprint
        start = load(own.stage_dir(Stage.sft), check_files=False).parents.get(START)
        if start not in (None, now):
            return "it continued from an earlier sft, which was rebuilt later"
    return _other_settings(main, directory)


def _other_settings(main: Run, directory: Path) -> str | None:
    """Name the settings of a control that differ from the configuration of its main run. None if none differ.

    Settings of the data are not compared, because models may be evaluated on other data.
    """
    listed = controls_of(main.config, str(main.stage_dir(Stage.sft)), has_mxfp4=True)
    control = next((each for each in listed if each.name == directory.name), None)
    if control is None:
        return _NOT_MADE
    for stage in control.stages:
        path = directory / stage.name
        if path.is_symlink() or not (path / ARTIFACT_FILE).is_file():
            continue
        recorded = load(path, check_files=False).settings
        made = {key: value for key, value in recorded.items() if not key.startswith("data.")}
        wanted = choose_settings(control.config, made)
        differences = [f"{key}: was {made[key]!r}, is {wanted[key]!r}" for key in made if made[key] != wanted[key]]
        if differences:
            return f"it was made with other settings: {'; '.join(differences)}"
    return None
