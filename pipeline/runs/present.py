"""The command that runs at present: which settings it takes from its run, and what it changes.

`begin` reads the command line. `begin_job` states the composed configuration of a job.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import PipelineConfig, Stage, composition, list_names
from pipeline.config.groups import RECIPE
from pipeline.config.overrides import assignment, belongs_to_run, by_key, is_override
from pipeline.config.secrets import has_secret
from pipeline.errors import list_first, user_errors
from pipeline.runs import absent_runs, commands, console, interruptions, launches, own_settings, taken_settings
from pipeline.runs.commands import Command
from pipeline.runs.own_settings import RECORD_FILE, OwnSettings

_BEGIN_A_RUN = (Stage.doctor.name, Stage.upcast.name, Stage.all.name)
_MOST_CHANGES = 6  # that one line names

_line: list[str] = []
_taken: tuple[str, OwnSettings] | None = None


def forget() -> None:
    """Forget the command of an earlier call in the same process."""
    global _line, _taken
    _line, _taken = [], None
    commands.forget()
    interruptions.forget()
    launches.forget()


@contextmanager
def one_call() -> Iterator[None]:
    """Inside the block, a call of the library has a command of its own. If it is interrupted, say how to go on."""
    forget()
    try:
        yield
    except KeyboardInterrupt:
        if (command := commands.current()) is not None:
            console.warn(command.stage, interruptions.message("interrupted"))
        raise
    finally:
        forget()


def begin(arguments: list[str], find_problems: Callable[[list[str]], list[str]]) -> list[str]:
    """Check a command line. Return it with the settings that it takes from its run.

    Args:
        arguments: the command line.
        find_problems: function that lists the problems of some arguments.

    Raises:
        UserError: an argument is wrong, or the record of the run is.
    """
    global _line, _taken
    launches.begin()
    if found := find_problems(arguments):
        raise user_errors(found)
    _line, _taken = arguments, taken_settings.find(arguments)
    if _taken is None:
        return arguments
    run_dir, own = _taken
    extended = taken_settings.extend(arguments, own)
    if found := find_problems(extended):
        raise user_errors([f"{run_dir}/{RECORD_FILE}: {problem}" for problem in found])
    return extended


def begin_job(config: PipelineConfig, job: Iterable[str], is_sweep: bool) -> None:
    """Declare the command of a job, so that messages can tell commands and the run can record its settings.

    Args:
        config: the configuration of the job.
        job: the overrides of the job.
        is_sweep: whether the job is one of a sweep.
    """
    overrides = by_key(job)
    if config.base_run is not None:
        overrides["base_run"] = assignment("base_run", config.base_run)
    is_whole = config.overwrite is True and config.stage is not Stage.all
    commands.begin(
        Command(
            _line,
            overrides,
            config.stage.name,
            config.run_dir,
            is_sweep=is_sweep,
            uses_own_settings=_taken is not None,
            config_dir=taken_settings.config_dir(_line) or (_taken[1].config_dir if _taken else None),
            pending=[config.stage.name] if is_whole else list(list_names(config.overwrite)),
        )
    )


def tell() -> None:
    """Print the settings that the job takes from its run, those that it changes, and those that are not recorded."""
    command = commands.current()
    if command is not None and (keys := own_settings.withheld(command.overrides)):
        console.warn(
            "run",
            f"the run does not record {', '.join(keys)}, because the value contains a secret. Give it with each command"
            " of this run, or write ${oc.env:NAME} for the secret.",
        )
    if _taken is None:
        _tell_of_new_run(command)
        return
    run_dir, own = _taken
    shown = shlex.join(text for text in own.overrides.values() if not has_secret(text)) or "the defaults"
    places = f" (paths of {', '.join(own.moved)} start at {own.working_directory})" if own.moved else ""
    changes = _changes(own)
    changed = f"; the command line changes {list_first(changes, _MOST_CHANGES)}" if changes else ""
    console.note("run", f"settings of {run_dir}: {shown}{places}{changed}")


def _tell_of_new_run(command: Command | None) -> None:
    """Say that a run of the default recipe begins, because a mistyped run_dir would begin one, too."""
    if command is None or command.is_sweep or command.stage not in _BEGIN_A_RUN or "run_dir" not in command.overrides:
        return
    if (problem := absent_runs.find_problem(command.run_dir, PipelineConfig.recipe)) is not None:
        console.note("run", f"{problem} A new run begins, with the settings of the default recipe.")


def _changes(own: OwnSettings) -> list[str]:
    """List the settings that this job has other values for than its run recorded."""
    given, command = by_key(each for each in _line if is_override(each)), commands.current()
    if command is None or not any(belongs_to_run(key) and own.overrides.get(key) != given[key] for key in given):
        return []
    directories = [] if command.config_dir is None else [Path(command.config_dir)]
    before, now = (composition.values([*each.values()], directories) for each in (own.overrides, command.overrides))
    keys = [key for key in dict.fromkeys([*now, *before]) if belongs_to_run(key) and key not in (RECIPE, "base_run")]
    pairs = {key: (before.get(key), now.get(key)) for key in keys}
    return [f"{key}: {_text(old)} -> {_text(new)}" for key, (old, new) in pairs.items() if old != new]


def _text(value: object) -> str:
    """Return a value as the command line writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
