"""The command line. It composes and resolves the configuration, runs the stage, and returns the exit status.

For a mistake of the user, it prints one message in place of Hydra's traceback. No large library is imported before a
stage runs, so --help and mistakes answer at once.
"""

import importlib
import os
import sys
import time
import traceback
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline import config
from pipeline.config import command_line, rules
from pipeline.errors import CheckFailed, UserError, user_errors
from pipeline.runs.processes import is_main_process
from pipeline.runs.run import Run

_PACKAGE = Path(__file__).resolve().parent
SWEEP_DIR = "sweep"
"""Subdirectory of run_dir in which each job of a sweep has its directory."""
_SECONDS_FOR_THE_MAIN_PROCESS = 10.0


def _beside_or_inside(name: str) -> Path:
    """Find conf/ or recipes/. It is beside the package in a checkout, and inside it in an installed wheel."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


CONF_DIR = _beside_or_inside("conf")
RECIPES_DIR = _beside_or_inside("recipes")


@cache
def register() -> None:
    """Register the schema and the recipes with Hydra, once per process."""
    store = ConfigStore.instance()
    store.store("schema", config.PipelineConfig)
    for path in sorted(RECIPES_DIR.glob("*.yaml")):
        node = OmegaConf.merge(OmegaConf.load(path), {"recipe": path.stem})
        store.store(path.stem, node, group="recipe", package="_global_", provider=str(path))


def run(composed: DictConfig) -> None:
    """Run one job: one stage of one recipe."""
    chosen = HydraConfig.get().runtime.choices.get("recipe")
    if chosen is not None:
        composed.recipe = chosen  # a recipe from --config-dir does not set its own name
    _keep_jobs_apart(composed)
    pipeline_config = rules.resolve(composed)
    for stage in Run(pipeline_config).earlier_stages():
        _module(stage).run(replace(pipeline_config, stage=stage, overwrite=False))
    _module(pipeline_config.stage).run(pipeline_config)


def _keep_jobs_apart(composed: DictConfig) -> None:
    """In a sweep, give each job its own directory, and let it share models with the run that run_dir names.

    If the user has written settings into run_dir, the jobs already differ, and run_dir stays as it is.
    """
    hydra_config = HydraConfig.get()
    job = hydra_config.job.override_dirname.replace("/", "_")
    written: Any = OmegaConf.to_container(composed, resolve=False)
    is_made_of_settings = "${" in written["run_dir"].replace("${recipe}", "")
    if hydra_config.mode is RunMode.MULTIRUN and job and not is_made_of_settings:
        composed.base_run = composed.run_dir
        composed.run_dir = f"{composed.run_dir}/{SWEEP_DIR}/{job}"


def _module(stage: config.Stage) -> ModuleType:
    return importlib.import_module(f"pipeline.stages.{stage.name}")


def main() -> NoReturn:
    """Entry point of `python -m pipeline` and of the console script."""
    # Without this variable, Hydra prints a traceback and exits with 1. A value from the shell is overwritten.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.exit(status(sys.argv[1:]))


def status(arguments: list[str]) -> int:
    """Run the command with these arguments, which sys.argv must hold too, and return the exit status."""
    try:
        register()
        if command_line.asks_for_help(arguments):
            print(command_line.help_text(CONF_DIR, RECIPES_DIR))
            return 0
        found = command_line.problems(arguments, CONF_DIR, RECIPES_DIR)
        if found:
            raise user_errors(found)
        sys.argv[1:] = command_line.name_jobs(arguments)
        hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")(_job)()
        return 0
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return _report(error, 2)
    except KeyboardInterrupt:
        return _report(UserError("interrupted; run the same command, without overwrite=true, to resume"), 130)
    except SystemExit as leaving:
        return int(leaving.code or 0) if not isinstance(leaving.code, str) else _report(UserError(leaving.code), 1)
    except Exception:  # noqa: BLE001 - the one place that turns any bug into its traceback and status 1
        traceback.print_exc()
        return 1


def _job(composed: DictConfig) -> None:
    # Hydra would print a second message for any other exception than SystemExit.
    try:
        run(composed)
    except (UserError, CheckFailed) as error:
        sys.exit(_report(error, error.exit_status))


def _report(error: Exception, status: int) -> int:
    # The first lines of messages from Hydra and OmegaConf say what is wrong and where. The other lines quote internals.
    own = isinstance(error, (UserError, CheckFailed))
    message = str(error) if own else " ".join(line.strip() for line in str(error).strip().splitlines()[:3])
    if is_main_process():
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        # The launcher stops all processes when one has ended. This process therefore lets the main process print its
        # message first. If this process still runs afterwards, it has failed alone.
        time.sleep(_SECONDS_FOR_THE_MAIN_PROCESS)
        print(f"error on process {os.environ['RANK']}: {message}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    main()
