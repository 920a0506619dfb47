"""Run one job: the stage of a configuration, on a machine that was checked."""

import errno
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.config import PipelineConfig
from pipeline.errors import UserError
from pipeline.runs import console, launches, other_libraries, preflight, tracking
from pipeline.runs.one_stage import run_stage
from pipeline.runs.preflight import FindMore
from pipeline.runs.run import Run

if TYPE_CHECKING:
    from pipeline.runs.artifacts import Artifact


def run_job(config: PipelineConfig, find_ahead: FindMore) -> "Artifact":
    """Run the stage that the configuration names, and return its artifact.

    If the job has a `base_run`, first run the earlier stages that `base_run` has.

    Args:
        config: the configuration of the job.
        find_ahead: finds the mistakes that a later stage would find, as `preflight.check` takes it.

    Raises:
        UserError: a mistake of the user.
        CheckFailed: a check found a wrong result.
        MachineError: the machine cannot do the work.
    """
    if "torch" not in sys.modules:
        console.note(config.stage.name, "loading PyTorch and other libraries, which takes a few seconds")
    other_libraries.silence()
    try:
        preflight.check(config, lambda job, fits: _find_ahead(job, fits, find_ahead))
        _agree(config.overwrite)
        with tracking.one_hint(config.stage.name):
            for stage in Run(config).earlier_stages():
                run_stage(replace(config, stage=stage, overwrite=False))
            return run_stage(config)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(
            f"{error.filename!s:.60}…: the path of {len(str(error.filename))} characters is too long."
        ) from error


def _find_ahead(config: PipelineConfig, is_launched_well: bool, find_ahead: FindMore) -> list[str]:
    """Call `find_ahead`. It reads the run, so the processes first agree on their launch, if they can."""
    if is_launched_well:
        _agree(config.overwrite)
    return find_ahead(config, is_launched_well)


def _agree(overwrite: object) -> None:
    """Let all processes have one launch if they look for its results. Agreeing again changes nothing."""
    if overwrite is not False:
        launches.agree()
