"""Compute the peak memory of each GPU while a stage trains.

`peaks` measures the memory with fake tensors. If measuring is impossible, or not worth the time, `needs` estimates the
memory, and the reason is reported.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace

from pipeline.checkpoints.gpt_oss import GptOssJson, Shape
from pipeline.config import Sharding, Stage
from pipeline.doctor import needs, peaks
from pipeline.doctor.fake_run import BACKWARD, FORWARD, OPTIMIZER, Job
from pipeline.doctor.needs import DeviceFigures
from pipeline.doctor.peaks import NotMeasured, Peaks
from pipeline.doctor.plan import Plan, as_batched
from pipeline.models import rounded_weights
from pipeline.models.sharding import STRATEGIES

_NOT_YET = "measuring takes time"
_SMALLEST = 10**9  # parameters; smaller models fit everywhere, so they are only estimated


def figures(
    plan: Plan, model: GptOssJson, longest: int, processes: int, *, is_measured: bool = True
) -> dict[str, DeviceFigures]:
    """Compute the memory of each training stage of a run.

    Args:
        plan: settings of the run.
        model: content of the source's config.json.
        longest: number of tokens of the longest example, after truncation.
        processes: number of processes that train together. Each has one GPU.
        is_measured: whether to measure the memory where possible. False: only estimate it.
    """
    stages = list(plan.trainings)
    trainings = [(plan, stage, processes) for stage in stages]
    found = of_stages(trainings, model, longest) if is_measured else _estimated(trainings, model, longest, _NOT_YET)
    return dict(zip(stages, found, strict=True))


def of_stages(trainings: Sequence[tuple[Plan, str, int]], model: GptOssJson, longest: int) -> list[DeviceFigures]:
    """Compute the memory of each training, in the given order. A training is (plan, name of the stage, processes)."""
    if needs.parameters(Shape.of(model, trainings[0][0].model_path))["all"] < _SMALLEST:
        return _estimated(trainings, model, longest, f"the model has fewer than {_SMALLEST:,} parameters")
    estimated = [estimate(plan, stage, model, longest, processes) for plan, stage, processes in trainings]
    caches = [_full_cache(plan, stage, model, longest) for plan, stage, _ in trainings]
    jobs = [_job(*each, model, longest, has_cache=not full) for each, full in zip(trainings, caches, strict=True)]
    buckets = [_bucket_bytes(training, model) for training in trainings]
    return [_figures(*each) for each in zip(peaks.measure(jobs), estimated, buckets, caches, strict=True)]


def _estimated(
    trainings: Sequence[tuple[Plan, str, int]], model: GptOssJson, longest: int, reason: str
) -> list[DeviceFigures]:
    sizes = [estimate(plan, stage, model, longest, processes) for plan, stage, processes in trainings]
    return [{"bytes": size, "phases": {}, "estimated_because": reason} for size in sizes]


def _full_cache(plan: Plan, stage: str, model: GptOssJson, longest: int) -> int:
    """Return the size of the cache of rounded weights if not all of them fit into it, else 0.

    The memory of such a cache does not grow with the number of layers. So `peaks`, which extrapolates from a few
    layers, must measure without it.
    """
    rounded = needs.of_stage(plan, stage, model, longest).rounded
    return rounded if rounded + 1 > _cache_bytes(plan) else 0


def _figures(found: Peaks | NotMeasured, estimated: int, buckets: int, cache: int) -> DeviceFigures:
    """Add the buckets of gradients and a full cache of rounded weights to the measured peaks."""
    if isinstance(found, NotMeasured):
        return {"bytes": estimated, "phases": {}, "estimated_because": found.reason}
    phases = asdict(found)
    phases[FORWARD] += cache
    phases[BACKWARD] += buckets + cache
    phases[OPTIMIZER] += buckets + cache
    return {"bytes": max(phases.values()), "phases": phases, "estimated_because": ""}


def _bucket_bytes(training: tuple[Plan, str, int], model: GptOssJson) -> int:
    """Return how many bytes the gradient buckets of DistributedDataParallel take. One process has no buckets."""
    plan, stage, processes = training
    if plan.sharding is not Sharding.none or processes == 1:
        return 0
    return needs.gradient_bytes(Shape.of(model, plan.model_path), plan.trainings[stage])


def estimate(plan: Plan, stage: str, model: GptOssJson, longest: int, processes: int) -> int:
    """Estimate the peak bytes of each GPU from the shapes and the settings. Arguments are those of `figures`."""
    alone = needs.of_stage(plan, stage, model, longest).on_each(processes, STRATEGIES[plan.sharding].sharded)
    return alone + _bucket_bytes((plan, stage, processes), model)


def least(plan: Plan, stage: str, model: GptOssJson, processes: int) -> int:
    """Compute the bytes of weights, gradients, optimizer and teacher on each GPU. They do not depend on the data."""
    parts = replace(needs.of_stage(plan, stage, model, 1), activations=0, rounded=0, gathered=0)
    return parts.on_each(processes, STRATEGIES[plan.sharding].sharded)


def _cache_bytes(plan: Plan) -> float:
    return rounded_weights.budget_bytes(plan.qat.rounded_cache_gib, plan.sharding, on_gpu=plan.on_gpu)


def _job(plan: Plan, stage: str, processes: int, model: GptOssJson, longest: int, *, has_cache: bool) -> Job:
    train, tokens = as_batched(plan.trainings[stage], longest, plan.data.max_length)
    is_quantized = stage == Stage.qat.name
    return Job(
        model=model,
        stage=stage,
        train=train,
        tokens=tokens,
        block_format=plan.block_format if is_quantized else None,
        cache_bytes=_cache_bytes(plan) if has_cache else 0,
        sharding=plan.sharding,
        processes=processes,
        is_packed=plan.is_packed(stage, model),
        has_own_base=plan.rounds_base,
        on_gpu=plan.on_gpu,
    )
