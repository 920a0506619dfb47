"""Take the settings of a command from the run that its run_dir names, if the command line has no recipe=."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import PipelineConfig
from pipeline.config.groups import RECIPE
from pipeline.config.overrides import assignment, by_key, is_override, plain_value, show_arguments, swept_values
from pipeline.errors import UserError
from pipeline.runs import own_settings
from pipeline.runs.artifacts import CONFIG_FILE, MODEL_STAGES
from pipeline.runs.own_settings import RECORD_FILE, OwnSettings
from pipeline.runs.paths import absolute
from pipeline.runs.yaml_files import read_yaml, value_at

_CONFIG_DIR = ("--config-dir", "-cd")
_SWEEP = ("-m", "--multirun")


def find(arguments: list[str]) -> tuple[str, OwnSettings] | None:
    """Return run_dir and the settings that a command line takes from its run. Return None if it takes none.

    Raises:
        UserError: the record is unreadable or invalid, or is missing although the run has another recipe than the
            default one. Or a sweep over run_dir would ignore settings of its runs.
    """
    given = by_key(argument for argument in arguments if is_override(argument))
    if RECIPE in given or "run_dir" not in given:
        return None
    run_dir = plain_value(given["run_dir"])
    if run_dir is None:
        _raise_if_swept_runs_have_settings(given, arguments)
        return None
    if not run_dir.strip():
        return None  # an error, see config.rules
    directory = absolute(run_dir)
    own = own_settings.read(directory)
    if own is None:
        _raise_if_recipe_is_needed(directory, run_dir, arguments)
        return None
    return run_dir, own


def extend(arguments: list[str], own: OwnSettings) -> list[str]:
    """Return the arguments. The recorded overrides stand before the overrides of the command line."""
    given = by_key(argument for argument in arguments if is_override(argument))
    first = next(i for i, argument in enumerate(arguments) if is_override(argument))
    recorded = [override for key, override in own.overrides.items() if key not in given]
    flags = [] if own.config_dir is None or config_dir(arguments) else ["--config-dir", own.config_dir]
    return [*flags, *arguments[:first], *recorded, *arguments[first:]]


def config_dir(arguments: list[str]) -> str | None:
    """Return the absolute directory that --config-dir names, or None."""
    for i, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in _CONFIG_DIR and (value or i + 1 < len(arguments)):
            return str(absolute(value or arguments[i + 1]))
    return None


def _raise_if_swept_runs_have_settings(given: dict[str, str], arguments: list[str]) -> None:
    """Raise UserError if a sweep over run_dir does not give all settings that one of its runs has recorded."""
    for run_dir in swept_values(given["run_dir"]) if {*_SWEEP} & {*arguments} else ():
        directory = absolute(run_dir)
        own = own_settings.read(directory)
        if own is None:
            _raise_if_recipe_is_needed(directory, run_dir, arguments)
        elif ignored := [override for key, override in own.overrides.items() if key not in given]:
            one = [assignment("run_dir", run_dir) if a == given["run_dir"] else a for a in arguments if a not in _SWEEP]
            raise UserError(
                f"{given['run_dir']}: a sweep over run_dir does not take the settings that its runs have recorded, and"
                f" {run_dir} has recorded {shlex.join(ignored)}. Give these settings, too. Or run one command for each"
                f" run, which takes them: {show_arguments(one)}"
            )


def _raise_if_recipe_is_needed(directory: Path, run_dir: str, arguments: list[str]) -> None:
    """Raise UserError if a run without a record was made with a recipe. Its config.yaml names the recipe."""
    for path in _config_files(directory):
        recipe = _recipe_in(path)
        if recipe not in (None, PipelineConfig.recipe):
            command = show_arguments([*arguments, f"recipe={recipe}"])
            raise UserError(
                f"run_dir={run_dir}: was made with recipe={recipe}, but has no {RECORD_FILE} with its settings. Name"
                f" the recipe, and all settings that the run changed (their values are in {path}): {command}"
            )


def _config_files(directory: Path) -> Iterator[Path]:
    """Yield config.yaml of the newest model of a run, if there is one."""
    found = [path for stage in reversed(MODEL_STAGES) if (path := directory / stage.name / CONFIG_FILE).is_file()]
    yield from found[:1]


def _recipe_in(path: Path) -> str | None:
    try:
        recipe = value_at(read_yaml(path), "recipe")
    except (OSError, ValueError):
        return None
    return recipe if isinstance(recipe, str) else None
