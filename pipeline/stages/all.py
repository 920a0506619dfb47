"""all: runs every stage in order. A stage that is up to date is skipped, and an interrupted one is resumed."""

from dataclasses import replace

from pipeline.checkpoints.config_json import read_model
from pipeline.config import PipelineConfig, QuantizeSource, Stage, leaves_nothing_to_round, list_controls, rebuilds
from pipeline.config.controls import reason_for_none
from pipeline.doctor import fit, machine
from pipeline.doctor.facts import Facts
from pipeline.doctor.plan import Plan
from pipeline.models import sharding, source
from pipeline.publish import hub
from pipeline.runs import rebuilding, up_to_date
from pipeline.runs.artifacts import Artifact
from pipeline.runs.console import say
from pipeline.runs.one_stage import run_stage
from pipeline.runs.records import DoctorRecord
from pipeline.runs.run import Run

_BEFORE_ALL = tuple(Stage)[: tuple(Stage).index(Stage.all)]
STAGES = tuple(stage for stage in _BEFORE_ALL if stage is not Stage.controls)
"""The stages that `all` always runs. It makes controls and uploads only if the user asks for it, and starts no server.
"""


def run(config: PipelineConfig) -> Artifact:
    """Run the stages and return the last one's artifact.

    Raises:
        UserError: `overwrite` does not name all stages that must be rebuilt, or names others.
    """
    config = config.with_target()  # the run may have been exported to another target
    stages = [stage for stage in _stages(config) if _reason_to_skip(stage, config) is None]
    rebuilding.check(config, stages)  # before anything is discarded
    hub.check(config.export)  # check now, because the upload starts hours later
    sharding.raise_if_impossible(config.sharding)  # also now, because training starts minutes later
    artifact = None
    with up_to_date.summarize(Stage.all.name, config.run_dir):
        for stage in _stages(config):
            if (reason := _reason_to_skip(stage, config)) is not None:
                say(stage.name, f"skipped, because {reason}")
            else:
                up_to_date.say_if_needed(stage.name, stage.value)
                artifact = _run(stage, config)
                if stage is Stage.doctor:
                    _raise_if_too_small(config, artifact)
    assert artifact is not None
    return artifact


def _stages(config: PipelineConfig) -> list[Stage]:
    chosen = list(_BEFORE_ALL if config.controls else STAGES)
    return chosen if config.export.push_to_hub is None else [*chosen, Stage.publish]


def _run(stage: Stage, config: PipelineConfig) -> Artifact:
    settings = replace(config, stage=stage, overwrite=rebuilds(config.overwrite, stage))
    if stage is Stage.controls and not settings.overwrite:
        settings = replace(settings, overwrite=",".join(list_controls(config.overwrite)) or False)
    if stage is Stage.evaluate and config.evaluate.source is None:
        settings = replace(settings, evaluate=replace(config.evaluate, source="all"))
    return run_stage(settings)


def _raise_if_too_small(config: PipelineConfig, report: Artifact) -> None:
    here = Run(config)
    model = read_model(source.locate_without_weights(here, config.model))
    free = machine.figures(here.directory)
    fit.raise_if_too_small(Facts.of(report.read(DoctorRecord), free, Plan.of(config), model, here))


def _reason_to_skip(stage: Stage, config: PipelineConfig) -> str | None:
    if stage is Stage.sft and config.quantize.source != QuantizeSource.sft:
        return f"quantize.source={config.quantize.source}"
    if stage in (Stage.quantize, Stage.qat) and leaves_nothing_to_round(
        config.quantize.source, config.sft, config.format.name
    ):
        return "sft.method=bf16_parts leaves nothing to round: the experts are still the source's own MXFP4 weights"
    return reason_for_none(config) if stage is Stage.controls else None
