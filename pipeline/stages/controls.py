"""controls: trains and rounds the models that QAT must beat. Each is a run in <run_dir>/controls/<name>.

The stage has no artifact of its own. Each control has the artifacts of its stages.
"""

import importlib
from dataclasses import replace

from pipeline.config import PipelineConfig, Stage
from pipeline.config.controls import Control, controls_of, reason_for_none
from pipeline.errors import CheckFailed, MachineError, UserError, prefixed
from pipeline.models import references, sharding
from pipeline.runs import controls, up_to_date
from pipeline.runs.artifacts import Artifact, Kind
from pipeline.runs.console import say
from pipeline.runs.one_stage import one_stage
from pipeline.runs.records import UpcastRecord
from pipeline.runs.run import Run


def run(config: PipelineConfig) -> Artifact:
    """Make all controls of the run, and return the last one's artifact."""
    here = Run(config)
    if (reason := reason_for_none(config)) is not None:
        raise UserError(f"stage=controls: there are no controls, because {reason}.")
    upcast, sft = references.require_upcast(here, config.model.path), here.require(Stage.sft)
    sharding.raise_if_impossible(config.sharding)
    made = []
    for control in controls_of(config, str(sft.directory)):
        if Stage.upcast in control.stages and _is_bf16_source(upcast):
            say("controls", f"{control.name}: skipped, because the source's experts are not packed MXFP4 weights")
        else:
            made.append(_make(here, upcast, control))
    return made[-1]


def _is_bf16_source(upcast: Artifact) -> bool:
    return upcast.kind is not Kind.packed and upcast.read(UpcastRecord).decoded_tensors == 0


def _make(here: Run, upcast: Artifact, control: Control) -> Artifact:
    """Run the stages of one control. Its upcast is the main run's if its experts are packed, as BF16 parts need."""
    shares_upcast = upcast.kind is Kind.packed
    stages = [stage for stage in control.stages if stage is not Stage.upcast or not shares_upcast]
    up_to_date.say_if_needed("controls", f"{control.name}: {control.config.run_dir}")
    try:
        controls.prepare(here, control, stages)
        artifacts = [_run_stage(replace(control.config, stage=stage)) for stage in stages]
    except (UserError, CheckFailed, MachineError) as error:
        raise prefixed(error, f"control {control.name} ({control.origin})") from error
    return artifacts[-1]


def _run_stage(config: PipelineConfig) -> Artifact:
    with one_stage(config):
        artifact: Artifact = importlib.import_module(f"pipeline.stages.{config.stage.name}").run(config)
        return artifact
