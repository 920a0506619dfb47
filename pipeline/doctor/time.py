"""Estimate how long each stage takes on a device. Nothing is measured except, without a GPU, the CPU's speed.

    seconds = FLOPs / (efficiency × peak FLOP/s) + bytes / (efficiency × peak bytes/s) + disk bytes / (disk bytes/s)

The efficiencies are assumptions, and the report names them. The terms are added, because products and memory traffic
are different kernels. Start-up, kernel launches and communication between GPUs are not counted, so a tiny model takes
longer than its estimate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from pipeline.checkpoints.config_json import is_quantized
from pipeline.checkpoints.gpt_oss import loaded_bytes
from pipeline.config import (
    EvaluateConfig,
    QatConfig,
    QuantizeConfig,
    QuantizeSource,
    RoundingMethod,
    Stage,
    calibration_tokens,
    first_training,
    writes_rounded,
)
from pipeline.config.gpus import GpuModel
from pipeline.config.quantize import CALIBRATION_SAMPLES
from pipeline.doctor import needs, work
from pipeline.doctor.needs import NeedFigures
from pipeline.doctor.plan import Plan
from pipeline.doctor.work import Model, Work

COMPUTE_EFFICIENCY = 0.3
"""Assumed share of the peak FLOP/s. Nobody has measured it for this program on a GPU."""
BANDWIDTH_EFFICIENCY = 0.5
"""Assumed share of the peak memory bandwidth."""
DISK_BYTES_PER_SECOND = 1e9
"""Assumed speed of the disk."""
FP32_SHARE = 0.1
"""Assumed speed of FP32 products on a GPU, as a share of the BF16 peak."""
_CANDIDATES = 4  # roundings that quantize.method=auto compares, at most
_WIDTH = 2  # bytes of a BF16 value
_MATRIX, _COPIED = 1024, 1 << 26  # sizes of the measurement on the CPU


@dataclass(frozen=True)
class Speed:
    """Speed of a device: FLOP/s of products in the training precision and in FP32, and bytes/s of its memory."""

    flops: float
    fp32_flops: float
    bytes_per_second: float
    name: str

    @classmethod
    def of_gpu(cls, gpu: GpuModel, name: str) -> "Speed":
        """Return the speed that is assumed for a GPU: its peaks times the efficiencies."""
        flops = COMPUTE_EFFICIENCY * gpu.flops
        return cls(flops, FP32_SHARE * flops, BANDWIDTH_EFFICIENCY * gpu.bytes_per_second, name)

    @classmethod
    def of_cpu(cls) -> "Speed":
        """Measure this CPU: an FP32 product of two matrices, and a copy of 64 MiB. This takes about 0.1 seconds."""
        import torch

        matrix, copied = torch.ones(_MATRIX, _MATRIX), torch.ones(_COPIED // 4)
        flops = 2 * _MATRIX**3 / _fastest(lambda: matrix @ matrix)
        return cls(flops, flops, 2 * _COPIED / _fastest(copied.clone), "this machine's CPU")

    def seconds(self, done: Work) -> float:
        """Return the seconds that the work takes on one device."""
        arithmetic = done.flops / self.flops + done.fp32_flops / self.fp32_flops
        return arithmetic + done.memory_bytes / self.bytes_per_second + done.disk_bytes / DISK_BYTES_PER_SECOND


def _fastest(run: Any) -> float:
    """Return the shortest time of a few calls, in seconds."""
    times = []
    for _ in range(4):
        before = perf_counter()
        run()
        times.append(perf_counter() - before)
    return min(times)


@dataclass(frozen=True)
class Amounts:
    """Numbers of examples, and of their tokens after truncation. `prompts` is the number of prompts to answer."""

    train_examples: int
    train_tokens: float
    validation_examples: int
    validation_tokens: float
    prompts: int = 0

    @property
    def mean(self) -> float:
        """Mean length of a training example, in tokens."""
        return self.train_tokens / max(self.train_examples, 1)


@dataclass(frozen=True)
class Schedule:
    """The course of a training stage.

    Attributes:
        steps: optimizer steps.
        tokens: tokens of one pass of one device.
        passes: passes of each device in a step, on average. The last step of an epoch may have fewer.
        validations: number of validations.
    """

    steps: int
    tokens: float
    passes: float
    validations: int

    @classmethod
    def of(cls, plan: Plan, stage: str, amounts: Amounts, processes: int) -> "Schedule":
        """Compute the schedule. With packing, rows hold data.max_length tokens. Early stopping is not considered."""
        train = plan.trainings[stage]
        rows = math.ceil(amounts.train_tokens / plan.data.max_length) if train.packing else amounts.train_examples
        rows = max(rows, 1)
        passes = math.ceil(rows / (train.batch_size * processes))
        in_epoch = math.ceil(passes / train.gradient_accumulation_steps)
        steps = train.max_steps if train.max_steps > 0 else math.ceil(train.epochs * in_epoch)
        tokens = amounts.train_tokens / (passes * processes)
        return cls(steps, tokens, passes / in_epoch, 1 + math.ceil(steps / train.eval_steps))


def training(plan: Plan, stage: str, config: Mapping[str, Any], amounts: Amounts, processes: int) -> Work:
    """Count the work of a training stage on each device: steps, validations, checkpoints, loading and saving.

    Args:
        plan: settings of the run.
        stage: `sft` or `qat`.
        config: content of the model's config.json.
        amounts: amounts of data.
        processes: number of devices. Each has its share of the passes.
    """
    model, train = Model.of(config, plan.model_path), plan.trainings[stage]
    is_packed, is_qat = plan.is_packed(stage, config), isinstance(train, QatConfig)
    has_teacher = isinstance(train, QatConfig) and train.distillation.weight > 0
    course, context = Schedule.of(plan, stage, amounts, processes), amounts.mean / 2
    one_pass = work.training_pass(
        model, train, course.tokens, context, is_packed=is_packed, rounds=is_qat, has_teacher=has_teacher
    )
    trained = needs.trained_parameters(model.shape, train)
    width = needs.gradient_bytes(model.shape, train) / max(trained, 1)
    states = needs.state_bytes(model.shape, train)
    optimizer = Work(memory_bytes=(3 * width * trained + 2 * states) / processes)
    step = one_pass.times(course.passes) + optimizer
    validation = work.forward(model, amounts.validation_tokens / processes, context, width=_WIDTH, is_packed=is_packed)
    saved = needs.checkpoint(model.shape, train)
    disk = model_bytes(model, is_packed=is_packed) + saved * math.ceil(course.steps / train.save_steps)
    return step.times(course.steps) + validation.times(course.validations) + Work(disk_bytes=disk)


def model_bytes(model: Model, *, is_packed: bool) -> int:
    """Return the size of a model's weights on disk, in bytes. BF16 if they are not packed."""
    return loaded_bytes(model.shape, _WIDTH, stays_packed=is_packed)


def rounding(plan: Plan, config: Mapping[str, Any], amounts: Amounts, needed: NeedFigures) -> Work:
    """Count the work of `quantize` on one device. Arguments are those of `training`, and the needs of the run."""
    model, asked = Model.of(config, plan.model_path), plan.quantize
    is_packed, context = plan.is_packed(first_name(plan), config), amounts.mean / 2
    samples = min(asked.calibration_samples or CALIBRATION_SAMPLES, amounts.train_examples)
    total = _passes(model, samples, amounts.mean, asked.batch_size, is_packed=is_packed)
    if writes_rounded(asked) or plan.rounds_base:
        total += Work(memory_bytes=4 * _WIDTH * model.expert_values, disk_bytes=needed["disk_bytes"]["quantize"])
        total += Work(disk_bytes=model_bytes(model, is_packed=is_packed))
    if asked.method in (RoundingMethod.gptq, RoundingMethod.auto):
        total += work.gptq(model, _calibrated(model, asked, amounts), context, is_packed=is_packed)
    if asked.method is RoundingMethod.auto:
        chosen = min(asked.auto_samples, amounts.validation_examples)
        mean = amounts.validation_tokens / max(amounts.validation_examples, 1)
        total += _passes(model, chosen, mean, asked.batch_size, is_packed=is_packed).times(_CANDIDATES + 1)
    return total


def first_name(plan: Plan) -> str:
    """Return the name of the first training stage."""
    return first_training(plan.quantize.source, plan.sft, plan.qat)[0]


def _calibrated(model: Model, asked: QuantizeConfig, amounts: Amounts) -> float:
    """Return the number of tokens that calibrate GPTQ."""
    if asked.calibration_samples is not None:
        return min(asked.calibration_samples, amounts.train_examples) * amounts.mean
    s = model.shape
    inputs = max(s.hidden_size, s.intermediate_size)
    return min(calibration_tokens(asked, inputs, s.num_local_experts, model.experts_per_token), amounts.train_tokens)


def _passes(model: Model, examples: int, mean: float, batch_size: int, *, is_packed: bool) -> Work:
    """Count the work of forward passes over `examples` examples of `mean` tokens."""
    passes = math.ceil(examples / batch_size)
    if not passes:
        return Work()
    one = work.forward(model, examples * mean / passes, mean / 2, width=_WIDTH, is_packed=is_packed)
    return one.times(passes)


def evaluation(plan: Plan, evaluate: EvaluateConfig, config: Mapping[str, Any], amounts: Amounts, models: int) -> Work:
    """Count the work of `evaluate` for `models` models on one device: validation loss and generated answers.

    Answers count with evaluate.generation.max_new_tokens tokens, so the work is an upper bound. Task suites and models
    on servers are not included.
    """
    model = Model.of(config, plan.model_path)
    is_packed = plan.starts_packed(is_mxfp4=is_quantized(config))
    count = min(evaluate.max_samples or amounts.validation_examples, amounts.validation_examples)
    mean = amounts.validation_tokens / max(amounts.validation_examples, 1)
    one = _passes(model, count, mean, evaluate.batch_size, is_packed=is_packed)
    one += Work(disk_bytes=model_bytes(model, is_packed=is_packed))
    if evaluate.generate:
        asked = evaluate.generation
        one += work.generation(
            model,
            amounts.prompts * asked.samples,
            batch_size=asked.batch_size,
            new_tokens=asked.max_new_tokens,
            context=amounts.mean / 2 + asked.max_new_tokens / 2,
            width=_WIDTH,
            is_packed=is_packed,
        )
    return one.times(models)


def of_stages(
    plan: Plan,
    evaluate: EvaluateConfig,
    samples: int,
    config: Mapping[str, Any],
    amounts: Amounts,
    needed: NeedFigures,
    processes: int,
) -> dict[str, Work]:
    """Count the work of each stage on its busiest device, by the stage's name. Stages that take seconds are left out.

    Args:
        plan, config, amounts, processes: as for `training`.
        evaluate: section `evaluate` of the configuration.
        samples: value of verify.samples.
        needed: needs of the run, for the bytes on disk.
    """
    model, disk = Model.of(config, plan.model_path), needed["disk_bytes"]
    is_mxfp4 = is_quantized(config)
    source = model_bytes(model, is_packed=is_mxfp4)
    whole = model_bytes(model, is_packed=plan.starts_packed(is_mxfp4=is_mxfp4))
    names = [name for name in plan.trainings if not (name == "sft" and plan.quantize.source is QuantizeSource.upcast)]
    trained = {name: training(plan, name, config, amounts, processes) for name in names}
    values = Work(memory_bytes=4 * _WIDTH * model.expert_values)  # decode and encode: read and write twice
    found = {Stage.upcast.name: Work(disk_bytes=source + disk["upcast"]) if disk["upcast"] else Work()}
    found |= {name: trained[name] for name in names if name == Stage.sft.name}
    if Stage.qat.name in plan.trainings:
        found |= {Stage.quantize.name: rounding(plan, config, amounts, needed), Stage.qat.name: trained["qat"]}
    found[Stage.export.name] = values + Work(disk_bytes=source + whole + disk["export"])
    checked = _passes(model, 2 * samples, amounts.mean, 1, is_packed=is_mxfp4)
    found[Stage.verify.name] = values + checked + Work(disk_bytes=2 * source + whole + 2 * disk["export"])
    count = len(names) + 2 + (Stage.qat.name in plan.trainings)  # upcast, the trained models, quantize and export
    found[Stage.evaluate.name] = evaluation(plan, evaluate, config, amounts, count)
    return found
