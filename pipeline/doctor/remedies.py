"""Find settings with which a training stage fits into the memory of a GPU. The memory is computed for each of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.checkpoints.config_json import is_quantized
from pipeline.config import (
    DistillationConfig,
    Experts,
    Method,
    Precision,
    QatConfig,
    Sharding,
    TrainConfig,
    can_train_parts,
    first_training,
)
from pipeline.doctor import device_memory
from pipeline.doctor.plan import Plan

_USUAL_GPUS = 8  # in one machine
_ROUND = 64
_SHORTEST = 512  # tokens; most examples would be truncated


@dataclass(frozen=True)
class Remedy:
    """A setting that saves memory.

    Attributes:
        setting: text for the command line.
        bytes: memory of each GPU with the setting.
        is_measured: true if the bytes are measured with fake tensors, false if they are estimated.
    """

    setting: str
    bytes: int
    is_measured: bool


@dataclass(frozen=True)
class _Change:
    setting: str
    plan: Plan
    processes: int


def find(plan: Plan, stage: str, model: Mapping[str, Any], longest: int, *, processes: int, gpus: int) -> list[Remedy]:
    """Compute the memory with each single setting that may help. Settings with less effect on the result come first.

    Args:
        plan: settings of the run.
        stage: name of the stage that does not fit.
        model: content of the source's config.json.
        longest: number of tokens of the longest example, after truncation.
        processes: number of processes that train together.
        gpus: number of GPUs in this machine.
    """
    is_mxfp4 = is_quantized(model)
    changes = [] if plan.is_packed(stage, model) else _packed_changes(plan, stage, processes, is_mxfp4=is_mxfp4)
    changes += _changes(plan, stage, longest, processes, gpus)
    if not changes:
        return []
    found = device_memory.of_stages([(each.plan, stage, each.processes) for each in changes], model, longest)
    return [
        Remedy(change.setting, memory["bytes"], not memory["estimated_because"])
        for change, memory in zip(changes, found, strict=True)
    ]


def _packed_changes(plan: Plan, stage: str, processes: int, *, is_mxfp4: bool) -> list[_Change]:
    """If only adapters are trained, return the change to packed experts. Packed experts give the same result."""
    _, first = first_training(plan.quantize.source, plan.sft, plan.qat)
    if Method.full in (first.method, plan.trainings[stage].method):
        return []
    condition = "" if is_mxfp4 else " if the weights of model.path are MXFP4 values"
    return [_Change(f"upcast.experts=packed{condition}", replace(plan, experts=Experts.packed), processes)]


def _changes(plan: Plan, stage: str, longest: int, processes: int, gpus: int) -> list[_Change]:
    train = plan.trainings[stage]

    def changed(setting: str, **fields: Any) -> _Change:
        return _Change(f"{stage}.{setting}", _with(plan, stage, **fields), processes)

    found = []
    if not train.gradient_checkpointing:
        found.append(changed("gradient_checkpointing=true", gradient_checkpointing=True))
    if not train.reshard_after_forward:
        found.append(changed("reshard_after_forward=true", reshard_after_forward=True))
    if train.batch_size > 1:
        found.append(changed("batch_size=1", batch_size=1))
    if isinstance(train, QatConfig):
        found += _qat_changes(train, changed)
    if plan.sharding is Sharding.none:
        count = processes if processes > 1 else gpus if gpus > 1 else _USUAL_GPUS
        setting = f"sharding=fsdp2 on {count} GPUs of this size"
        found.append(_Change(setting, replace(plan, sharding=Sharding.fsdp2), count))
    return found + _last_changes(plan, stage, train, longest, processes)


def _qat_changes(train: QatConfig, changed: Any) -> list[_Change]:
    found = []
    if train.rounded_cache_gib != 0:
        found.append(changed("rounded_cache_gib=0", rounded_cache_gib=0.0))
    if train.distillation.weight:
        found.append(changed("distillation.weight=0", distillation=DistillationConfig()))
    return found


def _last_changes(plan: Plan, stage: str, train: TrainConfig, longest: int, processes: int) -> list[_Change]:
    """Return changes that may lower the quality of the result: other methods of training, or shorter examples."""
    found = []
    half = _ROUND * (min(longest, plan.data.max_length) // (2 * _ROUND))
    if half >= _SHORTEST:
        shorter = replace(plan, data=replace(plan.data, max_length=half))
        found.append(_Change(f"data.max_length={half}", shorter, processes))
    if train.method is Method.full and can_train_parts(stage, plan.quantize.source, plan.experts):
        parts = _with(plan, stage, method=Method.bf16_parts)
        found.append(_Change(f"train@{stage}=bf16_parts", parts, processes))
    if train.method is not Method.lora:
        adapted = _with(plan, stage, method=Method.lora, precision=Precision.bf16)  # as conf/train/lora.yaml
        found.append(_Change(f"train@{stage}=lora", adapted, processes))
    return found


def _with(plan: Plan, stage: str, **fields: Any) -> Plan:
    """Return the plan with other settings of a training stage."""
    changed: dict[str, Any] = {stage: replace(plan.trainings[stage], **fields)}
    return replace(plan, **changed)
