"""Tell a mistyped run_dir from a new run, before the settings of the default recipe are used for it."""

from pathlib import Path

from pipeline.config import PipelineConfig, Stage
from pipeline.config.groups import RECIPE
from pipeline.errors import UserError, did_you_mean, list_first
from pipeline.runs import commands
from pipeline.runs.own_settings import RECORD_FILE
from pipeline.runs.paths import absolute

_MOST_NAMED = 5


def raise_if_absent(run_dir: str, recipe: str) -> None:
    """Raise UserError if a stage needs an earlier stage of a run that is not there, and nothing describes a new run.

    A recipe or a model on the command line describes a new run. Without both, the advice to make the missing stage
    would start a run of the default model.

    Args:
        run_dir: directory of the run, as the user gave it.
        recipe: name of the recipe.
    """
    problem = find_problem(run_dir, recipe)
    if problem is not None:
        raise UserError(f"{problem} Set run_dir to a run. For a new run, give recipe=<name>.")


def find_problem(run_dir: str, recipe: str) -> str | None:
    """Return that the run is not there, with the runs beside it. Return None if it is there, or is described."""
    directory = absolute(run_dir)
    if recipe != PipelineConfig.recipe or _is_run(directory) or _describes_a_run():
        return None
    beside = sorted(each.name for each in _directories_in(directory.parent) if _is_run(each))
    listed = f" (runs beside it: {list_first(beside, _MOST_NAMED)})" if beside else ""
    problem = "not the directory of a run" if directory.is_dir() else "no such run"
    return f"run_dir={run_dir}: {problem}{listed}.{did_you_mean(directory.name, beside)}"


def _is_run(directory: Path) -> bool:
    return (directory / RECORD_FILE).is_file() or any((directory / stage.name).is_dir() for stage in Stage)


def _describes_a_run() -> bool:
    command = commands.current()
    given = () if command is None else command.overrides
    return any(key in (RECIPE, "model") or key.startswith("model.") for key in given)


def _directories_in(directory: Path) -> list[Path]:
    try:
        return [each for each in directory.iterdir() if each.is_dir()]
    except OSError:
        return []
