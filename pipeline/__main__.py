"""Run a command line: compose the configuration, check it, run the stage, and return the exit status.

Hydra composes the configuration. By default, Hydra prints a traceback if the user makes a mistake. This module prints
one message instead. Hydra is imported only when a stage runs, and large libraries only by the stage. So the help,
completions and error messages appear at once.
"""

import os
import sys
import time
import traceback
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline import config
from pipeline.config import command_line, completion, help, rates, rules
from pipeline.config.groups import Folders
from pipeline.errors import CheckFailed, MachineError, UserError, user_errors
from pipeline.runs import allocator, console, other_libraries, preflight, provenance, stopping, tracking
from pipeline.runs.one_stage import run_stage
from pipeline.runs.processes import is_main_process
from pipeline.runs.run import Run
from pipeline.runs.stopping import Stopped

_PACKAGE = Path(__file__).resolve().parent
SWEEP_DIR = "sweep"
"""Subdirectory of run_dir. It holds one directory for each job of a sweep."""
_SECONDS_FOR_THE_MAIN_PROCESS = 10.0


def _beside_or_inside(name: str) -> Path:
    """Find conf/ or recipes/. An installed wheel has them inside the package, and a checkout has them beside it."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


CONF_DIR = _beside_or_inside("conf")
RECIPES_DIR = _beside_or_inside("recipes")
FOLDERS = Folders(CONF_DIR, RECIPES_DIR)


@cache
def register() -> None:
    """Register the schema, the recipes and the resolver `rate_of_sft` with Hydra, once per process."""
    from hydra.core.config_store import ConfigStore

    rates.register()
    store = ConfigStore.instance()
    store.store("schema", config.PipelineConfig)
    for path in sorted(RECIPES_DIR.glob("*.yaml")):
        node = OmegaConf.merge(OmegaConf.load(path), {"recipe": path.stem})
        store.store(path.stem, node, group="recipe", package="_global_", provider=str(path))


def run(composed: DictConfig) -> None:
    """Run the stage of one job. If the job has a `base_run`, first run the earlier stages that `base_run` has."""
    from hydra.core.hydra_config import HydraConfig

    chosen = HydraConfig.get().runtime.choices.get("recipe")
    if chosen is not None:
        composed.recipe = chosen  # `register` sets this field only in our own recipes, not in one from --config-dir
    _keep_jobs_apart(composed)
    pipeline_config = rules.resolve(composed)
    if "torch" not in sys.modules:
        console.note(pipeline_config.stage.name, "loading PyTorch and other libraries, which takes a few seconds")
    other_libraries.silence()
    preflight.check(pipeline_config)
    with tracking.one_hint(pipeline_config.stage.name):
        for stage in Run(pipeline_config).earlier_stages():
            run_stage(replace(pipeline_config, stage=stage, overwrite=False))
        run_stage(pipeline_config)


def _keep_jobs_apart(composed: DictConfig) -> None:
    """In a sweep, give each job its own directory. The run in run_dir becomes its `base_run`, whose models it reuses.

    A run_dir that contains settings (`r/${sft.learning_rate}`) already differs between the jobs, so it is not changed.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    if hydra_config.mode is not RunMode.MULTIRUN:
        return
    job = hydra_config.job.override_dirname.replace("/", "_")
    written: Any = OmegaConf.to_container(composed, resolve=False)
    is_made_of_settings = "${" in written["run_dir"].replace("${recipe}", "")
    if job and not is_made_of_settings:
        composed.base_run = composed.run_dir
        composed.run_dir = f"{composed.run_dir}/{SWEEP_DIR}/{job}"


def main() -> NoReturn:
    """Run the command in sys.argv and exit. `python -m pipeline` and the console script start here."""
    # If this variable is set, Hydra raises its errors. Otherwise it prints a traceback and exits with 1.
    # `setdefault` is not used here, because it would keep a value from the shell.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    allocator.let_segments_grow()
    stopping.heed_signals()
    sys.exit(status(sys.argv[1:]))


def status(arguments: list[str]) -> int:
    """Run the command in `arguments`, which must equal sys.argv[1:], and return the exit status."""
    try:
        if not arguments:
            if is_main_process():
                print(help.START, file=sys.stderr)
            return UserError.exit_status  # a script must not take a forgotten stage for success
        if (text := _answer(arguments)) is not None:
            console.show_page(text)
            return 0
        return _run_jobs(arguments)
    except (UserError, OmegaConfBaseException) as error:
        return _report(error, 2)
    except KeyboardInterrupt:
        return _report(UserError("interrupted; run the same command, without overwrite=true, to resume"), 130)
    except Stopped as stopped:
        return _report(UserError(str(stopped)), stopping.EXIT_STATUS)
    except SystemExit as leaving:
        return int(leaving.code or 0) if not isinstance(leaving.code, str) else _report(UserError(leaving.code), 1)
    except Exception:  # noqa: BLE001 - any other exception is a bug: show its traceback and return 1
        traceback.print_exc()
        return 1


def _answer(arguments: list[str]) -> str | None:
    """Return the text that the arguments ask for: help, versions or completions. Return None if a stage should run."""
    for flag in ("--shell-completion", "-sc"):
        if flag in arguments:
            order = [*arguments[arguments.index(flag) + 1 :], ""][0]
            return completion.answer(order, FOLDERS, os.environ.get(completion.BEFORE, ""))
    if command_line.asks_for("--help", arguments):
        names = command_line.words(arguments)
        return help.part(names, FOLDERS) if names else help.whole(FOLDERS)
    return provenance.versions() if command_line.asks_for("--version", arguments) else None


def _run_jobs(arguments: list[str]) -> int:
    """Run one job, or the jobs of a sweep, with Hydra."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException

    def run_job(composed: DictConfig) -> None:
        if total > 1:
            console.say("sweep", _job_title(HydraConfig.get(), total, swept))
        _job(composed)

    found = command_line.problems(arguments, FOLDERS)
    if found:
        raise user_errors(found)
    try:
        total, swept = command_line.sweep_jobs(arguments)
        register()
        sys.argv[1:] = command_line.name_jobs(arguments)
        hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")(run_job)()
    except HydraException as error:
        return _report(error, 2)
    return 0


def _job_title(hydra_config: Any, total: int, swept: set[str]) -> str:
    own = [each for each in hydra_config.overrides.task if each.partition("=")[0].lstrip("+") in swept]
    return f"job {hydra_config.job.num + 1} of {total}: {' '.join(own)}"


def _job(composed: DictConfig) -> None:
    # If a job raises an exception other than SystemExit, Hydra prints an extra line. So print the message here.
    try:
        run(composed)
    except (UserError, CheckFailed, MachineError) as error:
        sys.exit(_report(error, error.exit_status))
    except OmegaConfBaseException as error:
        sys.exit(_report(error, 2))


def _report(error: Exception, status: int) -> int:
    # In messages of Hydra and OmegaConf, the first three lines name the error and its place. The rest is internals.
    own = isinstance(error, (UserError, CheckFailed, MachineError))
    message = str(error) if own else " ".join(line.strip() for line in str(error).strip().splitlines()[:3])
    if is_main_process():
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        # The launcher stops all processes as soon as one ends.
        # So this process first waits until the main process has had time to print the error.
        # If this process is still running after that time, only this process has failed.
        time.sleep(_SECONDS_FOR_THE_MAIN_PROCESS)
        print(f"error on process {os.environ['RANK']}: {message}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    main()
