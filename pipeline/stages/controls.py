"""controls: trains and rounds the models that QAT must beat. Each is a run in <run_dir>/controls/<name>.

The stage has no artifact of its own. Each control has the artifacts of its stages.
"""

from dataclasses import replace

from pipeline.config import PipelineConfig, Stage
from pipeline.config.controls import (
    Control,
    controls_of,
    overwrite_problem,
    reason_for_none,
    reason_without_parts,
    rebuilds_stage,
)
from pipeline.config.pipeline import BF16_PARTS
from pipeline.errors import CheckFailed, MachineError, UserError, add_prefix
from pipeline.models import references, sharding
from pipeline.runs import commands, controls, up_to_date
from pipeline.runs.artifacts import Artifact, Kind
from pipeline.runs.console import say
from pipeline.runs.one_stage import run_stage
from pipeline.runs.records import UpcastRecord
from pipeline.runs.run import Run


def run(config: PipelineConfig) -> Artifact:
    """Make all controls of the run, and return the last one's artifact."""
    here = Run(config)
    if (reason := reason_for_none(config)) is not None:
        raise UserError(f"stage=controls: there are no controls, because {reason}.")
    upcast, sft = references.require_upcast(here, config.model.path), here.stage_dir(Stage.sft)
    references.stage_ref(here, Stage.sft)  # complete, or adapters of another program
    sharding.raise_if_impossible(config.sharding)
    has_mxfp4 = upcast.kind is Kind.packed or upcast.read(UpcastRecord).decoded_tensors > 0
    if (reason := reason_without_parts(config, has_mxfp4=has_mxfp4)) is not None:
        say("controls", f"{BF16_PARTS}: skipped, because {reason}")
    listed = [_without_shared(upcast, each) for each in controls_of(config, str(sft), has_mxfp4=has_mxfp4)]
    if (problem := overwrite_problem(config.overwrite, listed)) is not None:
        raise UserError(problem)
    made = [_make(here, each) for each in listed]
    commands.mark_begun(Stage.controls.name)  # only now, because controls that have not begun are still to be rebuilt
    return made[-1]


def _without_shared(upcast: Artifact, control: Control) -> Control:
    """Return the control without `upcast`, if the main run's has packed experts, as BF16 parts need."""
    shares_upcast = upcast.kind is Kind.packed
    own = tuple(stage for stage in control.stages if stage is not Stage.upcast or not shares_upcast)
    return replace(control, stages=own)


def _make(here: Run, control: Control) -> Artifact:
    """Run the stages of one control."""
    up_to_date.say_if_needed("controls", f"{control.name}: {control.config.run_dir}")
    try:
        controls.prepare(here, control, control.stages)
        artifacts = [_run(here, control, stage) for stage in control.stages]
    except (UserError, CheckFailed, MachineError) as error:
        raise add_prefix(error, f"control {control.name} ({control.origin})") from error
    commands.mark_begun(control.name)
    return artifacts[-1]


def _run(here: Run, control: Control, stage: Stage) -> Artifact:
    overwrite = rebuilds_stage(here.config.overwrite, control.name, stage)
    return run_stage(replace(control.config, stage=stage, overwrite=overwrite))
