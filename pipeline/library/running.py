"""Run a stage from a program or a notebook, with the settings of a command."""

import random
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike
from pathlib import Path

from pipeline.config import PipelineConfig, command_line, composition
from pipeline.config.overrides import assignment, is_override, key_of
from pipeline.doctor import find_ahead
from pipeline.errors import UserError, user_errors
from pipeline.runs import allocator, present, taken_settings
from pipeline.runs.artifacts import Artifact
from pipeline.runs.job import run_job
from pipeline.runs.paths import absolute

_one_at_a_time = threading.RLock()


def run(
    stage: str,
    *,
    recipe: str | None = None,
    run_dir: str | PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    config_dir: str | PathLike[str] | None = None,
) -> Artifact:
    """Run a stage, as the command `gpt-oss-qat stage=<stage> recipe=<recipe> run_dir=<run_dir> <overrides>` does.

    The stage prints the lines of the command. It does the work, resumes it, or is up to date, by the same rules.
    Calls from several threads wait for each other, because stages change settings of the whole process.

    Args:
        stage: name of the stage, such as "sft" or "all".
        recipe: name of a recipe. None means the settings that the run in `run_dir` has recorded. If there are none,
            it means the defaults of conf/config.yaml.
        run_dir: directory of the run. None means `runs/<recipe>` in the working directory. It may contain
            `${key}` for the value of a setting.
        overrides: further settings, each `key=value` in Hydra's syntax, such as "sft.max_steps=10" or "model=tiny".
        config_dir: directory with the caller's own configuration files, such as `recipe/<name>.yaml`. It is the flag
            --config-dir of the command. None if there is no such directory.

    Returns:
        The stage's artifact: its directory, and the fields of its artifact.json. For "all", the last stage's artifact.

    Raises:
        UserError: a mistake in the arguments, the data or the run. The command would exit with 2. Mistakes are reported
            together, and `problems` lists them.
        CheckFailed: a check found a wrong result, as "verify" does for a wrong export.
        MachineError: the machine cannot do the work, for example because its memory is too small.
    """
    flags = [] if config_dir is None else [f"--config-dir={_config_dir(config_dir)}"]
    arguments = [*flags, *_arguments(stage, recipe, run_dir, overrides)]
    with _one_at_a_time, present.one_call(), allocator.growing_segments(), _unchanged_random_numbers():
        return run_job(_begin(command_line.normalize(arguments)), find_ahead)


def _begin(arguments: list[str]) -> PipelineConfig:
    """Check a command, take the settings of its run, and compose its configuration."""
    whole = present.begin(arguments, lambda given: command_line.problems(given, composition.FOLDERS))
    settings, directory = [each for each in whole if is_override(each)], taken_settings.config_dir(whole)
    config = composition.compose(settings, [] if directory is None else [Path(directory)])
    present.begin_job(config, settings, is_sweep=False)
    present.tell()
    return config


def _arguments(
    stage: str, recipe: str | None, run_dir: str | PathLike[str] | None, overrides: Sequence[str]
) -> list[str]:
    """Return the arguments of the command.

    Raises:
        UserError: an override has the wrong type, is no setting, or sets a value that has its own parameter.
    """
    if isinstance(overrides, str):
        raise UserError(f"overrides={overrides!r}: must be a list of settings, as in overrides=[{overrides!r}].")
    given = {"stage": stage, "recipe": recipe, "run_dir": None if run_dir is None else str(Path(run_dir))}
    set_here = {name: value for name, value in given.items() if value is not None}
    found = [problem for each in overrides if (problem := _problem(each, set_here)) is not None]
    if found:
        raise user_errors(found)
    return [*(assignment(name, value) for name, value in set_here.items()), *overrides]


def _problem(override: str, given: dict[str, str]) -> str | None:
    """Say why an override cannot be used, or return None."""
    if not isinstance(override, str):
        return f"overrides: {override!r} is of type {type(override).__name__}, not a text such as 'sft.max_steps=10'."
    key = key_of(override)
    if override.startswith("-"):
        return f"overrides: {override!r} is a flag of the command. Give only settings, such as 'sft.max_steps=10'."
    if key in given:
        return f"overrides: {override!r} contradicts the argument {key}={given[key]!r}. Remove one of them."
    return None


def _config_dir(path: str | PathLike[str]) -> Path:
    directory = absolute(path)
    if not directory.is_dir():
        raise UserError(f"config_dir={str(path)!r}: no such directory.")
    return directory


@contextmanager
def _unchanged_random_numbers() -> Iterator[None]:
    """Restore the states of the random number generators that the caller has loaded. Training seeds them."""
    random_state, numpy, torch = random.getstate(), sys.modules.get("numpy"), sys.modules.get("torch")
    numpy_state = None if numpy is None else numpy.random.get_state()
    devices = [] if torch is None or not torch.cuda.is_initialized() else range(torch.cuda.device_count())
    try:
        with nullcontext() if torch is None else torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(random_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
