"""Record the settings of a command in its run, when a stage begins or is up to date."""

from collections.abc import Iterable
from pathlib import Path

from pipeline.config import Stage
from pipeline.config.groups import RECIPE
from pipeline.config.overrides import touches
from pipeline.errors import UserError
from pipeline.runs import commands, own_settings, places
from pipeline.runs.artifacts import ARTIFACT_FILE, MODEL_STAGES, load
from pipeline.runs.commands import Command
from pipeline.runs.own_settings import OwnSettings
from pipeline.runs.paths import absolute
from pipeline.runs.processes import is_main_process
from pipeline.runs.run import Run
from pipeline.runs.settings import Settings, choose_settings


def record(run: Run, stage: Stage, settings: Iterable[str]) -> None:
    """Add the settings of the present command to those that the run has recorded. Only the main process writes.

    A model that the run has already made keeps its settings: a setting with which this command contradicts the model is
    not recorded. So an experiment, such as an evaluation on other data, does not change the run.

    Args:
        run: the run.
        stage: the stage that begins or is up to date.
        settings: the full keys of the settings that the stage depends on.

    Raises:
        UserError: the record of the run is unreadable.
    """
    command = commands.current()
    if command is None or not is_main_process() or absolute(command.run_dir) != run.directory:
        return
    before = own_settings.read(run.directory)
    recorded = {} if before is None else before.overrides
    settings = list(settings)
    contradicted = _contradicted(run, stage, settings, before)
    wanted = _merge(recorded, command, settings)
    if wanted.get(RECIPE) != recorded.get(RECIPE) and contradicted:
        return
    kept = {key: text for key, text in wanted.items() if recorded.get(key) == text or not touches(key, contradicted)}
    kept |= {key: text for key, text in recorded.items() if key not in kept and touches(key, contradicted)}
    if before is None or kept != recorded:
        try:
            own_settings.write(run.directory, OwnSettings(kept, str(Path.cwd()), command.config_dir))
        except OSError as error:
            raise run.not_writable(run.directory, error) from error


def _merge(recorded: dict[str, str], command: Command, settings: list[str]) -> dict[str, str]:
    """Return the overrides of the run and the command. With recipe=, overrides of its stage are dropped."""
    given = own_settings.recordable(command.overrides)
    if command.uses_own_settings:
        return given  # it has the recorded overrides too
    if recorded.get(RECIPE) != given.get(RECIPE):
        return given
    kept = {key: text for key, text in recorded.items() if _outlasts(key, command, settings)}
    return {key: text for key, text in kept.items() if given.get(key, text) == text} | given


def _outlasts(key: str, command: Command, settings: list[str]) -> bool:
    """Return whether a recorded setting outlasts a command that has recipe= and does not give this setting."""
    is_kept = any(key == each or key.startswith(f"{each}.") for each in command.kept)
    return key == RECIPE or is_kept or not touches(key, settings)


def _contradicted(run: Run, stage: Stage, settings: list[str], own: OwnSettings | None) -> list[str]:
    """List the keys in which this command differs from the models of the run. Two paths of one place are equal.

    Models after the stage become stale if the stage is rebuilt, so they do not protect the settings of the stage.
    """
    found: list[str] = []
    for each in MODEL_STAGES:
        if each is not stage:
            made = _made_with(run, run.stage_dir(each))
            different = places.differing(made, choose_settings(run.config, made), own)
            is_later = stage in MODEL_STAGES and MODEL_STAGES.index(each) > MODEL_STAGES.index(stage)
            found += [key for key in different if not (is_later and key in settings)]
    return found


def _made_with(run: Run, directory: Path) -> Settings:
    try:
        if (directory / ARTIFACT_FILE).is_file():
            return load(directory, check_files=False).settings
        begun = (run.read_unfinished(directory) or {"settings": {}})["settings"]
    except UserError:  # a damaged model protects no settings; the stage that needs the model reports the damage
        return {}
    return {key: value for key, value in begun.items() if " " not in key}  # not a product of settings
