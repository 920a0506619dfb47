"""Settings that save memory or disk space, and the needs of the run with them.

Changes with less effect on the result come first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.checkpoints.config_json import is_quantized
from pipeline.config import (
    DistillationConfig,
    Experts,
    Method,
    PipelineConfig,
    Precision,
    Sharding,
    TrainConfig,
    first_training,
)
from pipeline.config import memory_savings as savings
from pipeline.config.rules import problems
from pipeline.doctor import device_memory, prediction
from pipeline.doctor.facts import Facts
from pipeline.doctor.plan import Plan

_ROUND = 64
_FEWEST_CHECKPOINTS = 2
_COUNTS = (2, 4, 8, 16, 32, 64)  # GPUs


@dataclass(frozen=True)
class Change:
    """A change of settings.

    Attributes:
        settings: words for the command line.
        apply: function that changes a configuration accordingly.
    """

    settings: tuple[str, ...]
    apply: Callable[[PipelineConfig], PipelineConfig]


def predict(facts: Facts, changes: Sequence[Change], *, is_measured: bool) -> Facts:
    """Return the facts of the run with these changes. `is_measured`: as for `prediction.needs_of`."""
    config = _applied(facts.run.config, changes)
    longest = facts.data["lengths"]["longest"]
    count, on_gpu = facts.machine["processes"], facts.machine["gpus"] > 0
    needed = prediction.needs_of(config, facts.model, longest, count, is_measured=is_measured, on_gpu=on_gpu)
    return replace(facts, plan=Plan.of(config), needs=needed)


def keep_allowed(facts: Facts, chosen: Sequence[Change], group: Sequence[Change]) -> list[Change]:
    """Return the changes of a group that break no rule between settings, if they are added to those chosen."""
    kept: list[Change] = []
    before = set(problems(facts.run.config))
    for change in group:
        if not set(problems(_applied(facts.run.config, [*chosen, *kept, change]))) - before:
            kept.append(change)
    return kept


def count_gpus(facts: Facts, size: int) -> int | None:
    """Return the fewest GPUs with `size` free bytes on which the training stages fit with sharding=fsdp2.

    The memory is estimated. None if 64 GPUs are too few, or if the run is sharded already.
    """
    if facts.plan.sharding is not Sharding.none:
        return None
    sharded = replace(facts.plan, sharding=Sharding.fsdp2)
    longest = min(facts.data["lengths"]["longest"], facts.plan.data.max_length)
    for count in _COUNTS:
        each = [device_memory.estimate(sharded, name, facts.model, longest, count) for name in sharded.trainings]
        if max(each) <= size:
            return count
    return None


def groups(facts: Facts) -> Iterator[list[Change]]:
    """Yield groups of changes that only cost time. The changes of a group do the same in several stages."""
    config, trains = facts.run.config, _trainings(facts)
    yield _packed(facts)
    if facts.plan.sharding is Sharding.none and facts.machine["processes"] > 1 and facts.machine["gpus"]:
        yield [Change(("sharding=fsdp2",), lambda c: replace(c, sharding=Sharding.fsdp2))]
    for saving in (savings.checkpoint_gradients, savings.reshard_after_forward):
        yield [_change(name, **change) for name, train in trains.items() if (change := saving(train))]
    if config.qat.rounded_cache_gib and "qat" in trains:
        yield [_change("qat", rounded_cache_gib=0.0)]
    yield [_change(name, **change) for name, train in trains.items() if (change := savings.use_small_batch(train))]
    yield [
        _change(name, save_total_limit=_FEWEST_CHECKPOINTS)
        for name, train in trains.items()
        if train.save_total_limit > _FEWEST_CHECKPOINTS
    ]
    if config.controls:
        yield [Change(("controls=false",), lambda c: replace(c, controls=False))]


def costly_groups(facts: Facts) -> Iterator[list[Change]]:
    """Yield groups of changes that save memory, but may lower the quality of the result."""
    config, trains = facts.run.config, _trainings(facts)
    if config.qat.distillation.weight and "qat" in trains:
        yield [Change(("qat.distillation.weight=0",), lambda c: _with(c, "qat", distillation=DistillationConfig()))]
    yield [_lora(name) for name, train in trains.items() if train.method is not Method.lora]
    limit = min(facts.data["lengths"]["longest"], config.data.max_length)
    while (limit := _ROUND * (limit // (2 * _ROUND))) >= savings.SHORTEST:
        yield [_shorter(limit)]


def _trainings(facts: Facts) -> dict[str, TrainConfig]:
    return {name: getattr(facts.run.config, name) for name in facts.plan.trainings}


def _packed(facts: Facts) -> list[Change]:
    """If only adapters are trained, return the change to packed experts. They give the same result."""
    config = facts.run.config
    _, first = first_training(config.quantize.source, config.sft, config.qat)
    if config.upcast.experts is not Experts.bf16 or first.method is Method.full or not is_quantized(facts.model):
        return []
    packed = replace(config.upcast, experts=Experts.packed)
    return [Change(("upcast.experts=packed",), lambda c: replace(c, upcast=packed))]


def _lora(stage: str) -> Change:
    """Train adapters, with the precision of conf/train/lora.yaml."""
    return Change(
        (savings.write_group(stage, "lora"),), lambda c: _with(c, stage, method=Method.lora, precision=Precision.bf16)
    )


def _shorter(limit: int) -> Change:
    return Change((f"data.max_length={limit}",), lambda c: replace(c, data=replace(c.data, max_length=limit)))


def _change(stage: str, **fields: object) -> Change:
    return Change(savings.write_overrides(stage, fields), lambda c: _with(c, stage, **fields))


def _with(config: PipelineConfig, stage: str, **fields: object) -> PipelineConfig:
    """Return the configuration with other settings of a training stage."""
    changed: dict[str, Any] = {stage: replace(getattr(config, stage), **fields)}
    return replace(config, **changed)


def _applied(config: PipelineConfig, changes: Sequence[Change]) -> PipelineConfig:
    for change in changes:
        config = change.apply(config)
    return config
