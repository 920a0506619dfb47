"""controls: trains and rounds the models that QAT must beat. Each is a run in <run_dir>/controls/<name>.

The stage has no artifact of its own. Each control has the artifacts of its stages.
"""

from dataclasses import replace

from pipeline.config import PipelineConfig, Stage
from pipeline.config.controls import BF16_PARTS, Control, controls_of, reason_for_none, reason_without_parts
from pipeline.errors import CheckFailed, MachineError, UserError, prefixed
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
    upcast, sft = references.require_upcast(here, config.model.path), here.require(Stage.sft)
    sharding.raise_if_impossible(config.sharding)
    has_mxfp4 = upcast.kind is Kind.packed or upcast.read(UpcastRecord).decoded_tensors > 0
    if (reason := reason_without_parts(config, has_mxfp4=has_mxfp4)) is not None:
        say("controls", f"{BF16_PARTS}: skipped, because {reason}")
    made = [_make(here, upcast, each) for each in controls_of(config, str(sft.directory), has_mxfp4=has_mxfp4)]
    commands.mark_begun(Stage.controls.name)  # only now, because controls that have not begun are still to be rebuilt
    return made[-1]


def _make(here: Run, upcast: Artifact, control: Control) -> Artifact:
    """Run the stages of one control. Its upcast is the main run's if its experts are packed, as BF16 parts need."""
    shares_upcast = upcast.kind is Kind.packed
    stages = [stage for stage in control.stages if stage is not Stage.upcast or not shares_upcast]
    up_to_date.say_if_needed("controls", f"{control.name}: {control.config.run_dir}")
    try:
        controls.prepare(here, control, stages)
        artifacts = [run_stage(replace(control.config, stage=stage)) for stage in stages]
    except (UserError, CheckFailed, MachineError) as error:
        raise prefixed(error, f"control {control.name} ({control.origin})") from error
    return artifacts[-1]
