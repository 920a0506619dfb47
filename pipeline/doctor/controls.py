"""Compute the needs of a run's controls, without the needs of the run itself."""

from collections.abc import Sequence

from pipeline.checkpoints.config_json import is_quantized
from pipeline.checkpoints.gpt_oss import GptOssJson, Shape
from pipeline.config import Stage
from pipeline.doctor import device_memory, needs
from pipeline.doctor.needs import ControlFigures
from pipeline.doctor.plan import Plan


def figures(plan: Plan, stages: Sequence[Stage], model: GptOssJson, longest: int, processes: int) -> ControlFigures:
    """Compute the needs of one control.

    Args:
        plan: settings of the control's run.
        stages: the stages that the control runs.
        model, longest, processes: as for `device_memory.figures`.
    """
    shape = Shape.of(model, plan.model_path)
    disk = needs.disk(plan, shape, is_quantized(model))
    trains = Stage.sft in stages
    resumable = [needs.checkpoints(shape, plan.sft)] if trains else []
    if Stage.quantize in stages:
        resumable.append(needs.kept_layers(plan, model, longest))
    return {
        "disk_bytes": sum(disk[stage.name] for stage in stages),
        "checkpoint_bytes": max(resumable, default=0),
        "device_bytes": device_memory.estimate(plan, Stage.sft.name, model, longest, processes) if trains else 0,
    }
