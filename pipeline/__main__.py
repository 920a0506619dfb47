"""Run a command line: compose the configuration, check it, run the stage, and return the exit status.

Hydra composes the configuration. By default, Hydra prints a traceback if the user makes a mistake. This module prints
one message instead. Hydra is imported only when a stage runs, and large libraries only by the stage. So the help,
completions and error messages appear at once.
"""

import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config import PipelineConfig, command_line, completion, composition, help, program, rules, secrets
from pipeline.config.composition import CONF_DIR, FOLDERS, register
from pipeline.config.groups import RECIPE
from pipeline.doctor import find_ahead
from pipeline.errors import CheckFailed, MachineError, UserError
from pipeline.runs import allocator, console, interruptions, present, provenance, stopping
from pipeline.runs.job import run_job
from pipeline.runs.processes import has_lost_another_process, is_main_process
from pipeline.runs.stopping import Stopped

SWEEP_DIR = "sweep"
"""Subdirectory of run_dir. It holds one directory for each job of a sweep."""
_SECONDS_FOR_THE_MAIN_PROCESS = 10.0


def run(composed: DictConfig) -> None:
    """Run the stage of one job."""
    from hydra.core.hydra_config import HydraConfig

    composition.keep_choice(composed, HydraConfig.get().runtime.choices.get(RECIPE))
    _keep_jobs_apart(composed)
    config = rules.resolve(composed)
    _begin_command(config)
    run_job(config, find_ahead)


def _begin_command(config: PipelineConfig) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    is_sweep = hydra_config.mode is RunMode.MULTIRUN
    present.begin_job(config, _overrides(hydra_config), is_sweep)
    if not is_sweep or hydra_config.job.num == 0:
        present.tell()


def _keep_jobs_apart(composed: DictConfig) -> None:
    """In a sweep, give each job its own directory. The run in run_dir becomes its `base_run`, whose models it reuses.

    A run_dir that contains settings (`r/${sft.learning_rate}`) already differs between the jobs, so it is not changed.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    if hydra_config.mode is not RunMode.MULTIRUN:
        return
    secrets.remember(composed)
    job = secrets.without_secrets(hydra_config.job.override_dirname).replace("/", "_")
    written: Any = OmegaConf.to_container(composed, resolve=False)
    is_made_of_settings = "${" in written["run_dir"].replace("${recipe}", "")
    is_empty = not composed.run_dir.strip()  # an error, see config.rules
    if job and not is_made_of_settings and not is_empty:
        composed.base_run = composed.run_dir
        composed.run_dir = f"{composed.run_dir}/{SWEEP_DIR}/{job}"


def main() -> NoReturn:
    """Run the command in sys.argv and exit. `python -m pipeline` and the console script start here."""
    # If this variable is set, Hydra raises its errors. Otherwise it prints a traceback and exits with 1.
    # `setdefault` is not used here, because it would keep a value from the shell.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    console.let_streams_print()
    allocator.let_segments_grow()
    stopping.heed_signals()
    sys.exit(status(sys.argv[1:]))


def status(arguments: list[str]) -> int:
    """Run the command in `arguments`, which must equal sys.argv[1:], and return the exit status."""
    present.forget()
    try:
        if not arguments:
            if is_main_process():
                print(program.name_program(help.START), file=sys.stderr)
            return UserError.exit_status  # a script must not take a forgotten stage for success
        if (text := _answer(arguments)) is not None:
            console.show_page(text)
            return 0
        return _run_jobs(arguments)
    except (UserError, OmegaConfBaseException) as error:
        return _report(error, 2)
    except KeyboardInterrupt:
        return _report(UserError(interruptions.message("interrupted")), 130)
    except Stopped as stopped:
        # The main process gets the signal too, or has printed the error for which the launcher stops this process.
        message = interruptions.message(str(stopped))
        return _report(UserError(message), stopping.EXIT_STATUS) if is_main_process() else stopping.EXIT_STATUS
    except SystemExit as leaving:
        return int(leaving.code or 0) if not isinstance(leaving.code, str) else _report(UserError(leaving.code), 1)
    except Exception as error:  # noqa: BLE001 - see _report_other
        return _report_other(error)


def _answer(arguments: list[str]) -> str | None:
    """Return the text that the arguments ask for: help, versions or completions. Return None if a stage should run."""
    for flag in ("--shell-completion", "-sc"):
        if flag in arguments:
            order = [*arguments[arguments.index(flag) + 1 :], ""][0]
            return completion.answer(order, FOLDERS, os.environ.get(completion.BEFORE, ""))
    if command_line.asks_for("--help", arguments):
        if (text := help.choice([each for each in arguments if not each.startswith("-")], FOLDERS)) is not None:
            return program.name_program(text)
        names = command_line.words(arguments)
        return program.name_program(help.part(names, FOLDERS) if names else help.whole(FOLDERS))
    return provenance.versions() if command_line.asks_for("--version", arguments) else None


def _run_jobs(arguments: list[str]) -> int:
    """Run one job, or the jobs of a sweep, with Hydra."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException

    def start_job(composed: DictConfig) -> None:
        if total > 1:
            console.say("sweep", _job_title(HydraConfig.get(), total, swept))
        _job(composed)

    sys.argv[1:] = arguments = present.begin(
        command_line.normalize(arguments), lambda given: command_line.problems(given, FOLDERS)
    )
    try:
        _warn_of_hiding_file()
        total, swept = command_line.sweep_jobs(arguments)
        register()
        sys.argv[1:] = command_line.name_jobs(arguments)
        hydra.main(config_path=str(CONF_DIR), config_name="config", version_base=composition.HYDRA_VERSION)(start_job)()
    except HydraException as error:
        return _report(error, 2)
    return 0


def _warn_of_hiding_file() -> None:
    if (file := program.find_hiding_file(Path.cwd())) is not None:
        console.warn(
            program.COMMAND,
            f"{file} hides this program from `{program.MODULE}`, from `torchrun -m pipeline` and from Python programs"
            " that start in this directory. They would run that file. This command is not affected.",
        )


def _overrides(hydra_config: Any) -> list[str]:
    """Return the overrides of a job as they were written. Hydra's list resolves `${oc.env:NAME}` when it is read."""
    written: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    return list(written)


def _job_title(hydra_config: Any, total: int, swept: set[str]) -> str:
    own = [each for each in _overrides(hydra_config) if each.partition("=")[0].lstrip("+") in swept]
    return f"job {hydra_config.job.num + 1} of {total}: {' '.join(own)}"


def _job(composed: DictConfig) -> None:
    # If a job raises an exception other than SystemExit, Hydra prints an extra line. So print the message here.
    try:
        run(composed)
    except (UserError, CheckFailed, MachineError) as error:
        sys.exit(_report(error, error.exit_status))
    except OmegaConfBaseException as error:
        sys.exit(_report(error, 2))
    except Exception as error:  # noqa: BLE001 - as in `status`. Hydra's extra line would show secrets.
        sys.exit(_report_other(error))


def _report_other(error: Exception) -> int:
    """Report that another process has ended, or else a bug: with its traceback."""
    if has_lost_another_process(error):
        return _report(MachineError("the connection to another process was lost. Its own message says why."), 1)
    with suppress(Stopped, KeyboardInterrupt):  # as in `_report`
        print(secrets.without_secrets(traceback.format_exc()), end="", file=sys.stderr, flush=True)
    return 1


def _report(error: Exception, status: int) -> int:
    # This process ends anyway, so a signal only ends the report. No handler would catch the exception that it raises.
    with suppress(Stopped, KeyboardInterrupt):
        _print_error(error)
    return status


def _print_error(error: Exception) -> None:
    own = isinstance(error, (UserError, CheckFailed, MachineError))
    message = secrets.without_secrets(str(error) if own else composition.short_message(error))
    if is_main_process():
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        # The launcher stops all processes as soon as one ends.
        # So this process first waits until the main process has had time to print the error.
        # If this process is still running after that time, only this process has failed.
        time.sleep(_SECONDS_FOR_THE_MAIN_PROCESS)
        print(f"error on process {os.environ['RANK']}: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
