"""Predict what a run with its controls needs: memory of each device, and space on disk."""

from dataclasses import replace

from pipeline.checkpoints.config_json import is_quantized
from pipeline.checkpoints.gpt_oss import GptOssJson
from pipeline.config import PipelineConfig, Stage
from pipeline.config.controls import Control, controls_of
from pipeline.doctor import controls, device_memory, needs
from pipeline.doctor.needs import NeedFigures
from pipeline.doctor.plan import Plan


def needs_of(
    config: PipelineConfig,
    model: GptOssJson,
    longest: int,
    processes: int,
    *,
    is_measured: bool = True,
    on_gpu: bool = True,
) -> NeedFigures:
    """Compute the needs of a run.

    Args:
        config: settings of the run.
        model: content of the source's config.json.
        longest: number of tokens of the longest example, before truncation.
        processes: number of processes that train together.
        is_measured: whether to measure the memory with fake tensors where possible. False: only estimate it.
        on_gpu: whether the processes train on GPUs.
    """
    plan, kept = replace(Plan.of(config), on_gpu=on_gpu), min(longest, config.data.max_length)
    devices = device_memory.figures(plan, model, kept, processes, is_measured=is_measured)
    needed = needs.figures(plan, model, kept, devices)
    if config.controls:
        needed["controls"] = {
            control.name: controls.figures(
                replace(Plan.of(control.config), on_gpu=on_gpu), control.stages, model, kept, processes
            )
            for control in _controls(config, plan, is_mxfp4=is_quantized(model))
        }
    return needed


def _controls(config: PipelineConfig, plan: Plan, *, is_mxfp4: bool) -> list[Control]:
    has_mxfp4 = is_mxfp4 or plan.starts_packed(is_mxfp4=is_mxfp4)
    return controls_of(config, f"{config.run_dir}/{Stage.sft.name}", has_mxfp4=has_mxfp4)
