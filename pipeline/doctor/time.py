"""Count the work of each stage on its busiest device. `work` has the formulas, and `speeds` turns work into seconds."""

import math
from dataclasses import dataclass

from pipeline.checkpoints.config_json import is_quantized
from pipeline.checkpoints.dtypes import TRAIN_TYPES, bytes_per_value, torch_dtype
from pipeline.checkpoints.gpt_oss import GptOssJson, loaded_bytes
from pipeline.config import (
    Dtype,
    EvaluateConfig,
    QatConfig,
    QuantizeConfig,
    RoundingMethod,
    Stage,
    TrainConfig,
    calibration_tokens,
    first_training,
    writes_rounded,
)
from pipeline.config.quantize import CALIBRATION_SAMPLES
from pipeline.doctor import needs, work
from pipeline.doctor.activations import compute_width
from pipeline.doctor.lengths import Amounts
from pipeline.doctor.needs import NeedFigures
from pipeline.doctor.plan import Plan
from pipeline.doctor.work import Batch, Model, Work
from pipeline.models import attention
from pipeline.models.attention import Capability
from pipeline.models.sharding import STRATEGIES

_CANDIDATES = 4  # roundings that quantize.method=auto compares, at most
_BF16 = "BF16"
_WIDTH = bytes_per_value(_BF16)
_STORED = {Dtype.bfloat16: _BF16, Dtype.float32: "F32"}


@dataclass(frozen=True)
class Devices:
    """The devices of a run: how many train together, and the compute capability of each GPU (None: CPUs)."""

    count: int = 1
    capability: Capability | None = None


@dataclass(frozen=True)
class Inference:
    """Settings of stages that run models without training them.

    Attributes:
        evaluate: section `evaluate` of the configuration.
        samples: value of verify.samples.
        dtype: value of model.dtype.
    """

    evaluate: EvaluateConfig
    samples: int
    dtype: Dtype = Dtype.bfloat16


@dataclass(frozen=True)
class Schedule:
    """The course of a training stage.

    Attributes:
        steps: optimizer steps.
        examples: examples in one pass of one device, on average. The last pass of an epoch may have fewer.
        passes: passes of each device in a step, on average. The last step of an epoch may have fewer.
        validations: number of validations.
    """

    steps: int
    examples: float
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
        examples = amounts.train_examples / (passes * processes)
        return cls(steps, examples, passes / in_epoch, 1 + math.ceil(steps / train.eval_steps))


def training(plan: Plan, stage: str, config: GptOssJson, amounts: Amounts, devices: Devices) -> Work:
    """Count the work of a training stage on each device: steps, validations, checkpoints, loading and saving.

    Args:
        plan: settings of the run.
        stage: `sft` or `qat`.
        config: content of the model's config.json.
        amounts: amounts of data.
        devices: the devices. Each has its share of the passes.
    """
    model, train = Model.of(config, plan.model_path), plan.trainings[stage]
    is_packed, is_qat = plan.is_packed(stage, config), isinstance(train, QatConfig)
    has_teacher = isinstance(train, QatConfig) and train.distillation.weight > 0
    course = Schedule.of(plan, stage, amounts, devices.count)
    kernel = attention.for_training(train, devices.capability)
    batch = _training_batch(train, course.examples, amounts, kernel)
    one_pass = work.training_pass(model, train, batch, is_packed=is_packed, rounds=is_qat, has_teacher=has_teacher)
    optimizer = work.optimizer_step(
        gradient_bytes=needs.gradient_bytes(model.shape, train),
        state_bytes=needs.state_bytes(model.shape, train),
        passes=course.passes,
        shards=devices.count if "optimizer" in STRATEGIES[plan.sharding].sharded else 1,
    )
    runs = _Passes(model, amounts, kernel, compute_width(train), is_packed)
    validation = runs.over(amounts.validation_examples, amounts.validation_mean, train.batch_size, devices.count)
    saved = needs.checkpoint(model.shape, train)
    disk = model_bytes(model, is_packed=is_packed) + saved * math.ceil(course.steps / train.save_steps)
    step = one_pass.times(course.passes) + optimizer
    return step.times(course.steps) + validation.times(course.validations) + Work(disk_bytes=disk)


def _training_batch(train: TrainConfig, examples: float, amounts: Amounts, kernel: str) -> Batch:
    """Return the rows of a pass. Rows are padded to the longest. TRL lays packed rows end to end, without padding."""
    mean, weighted = amounts.lengths.longest_of(1 if train.packing else train.batch_size)
    tokens = examples * amounts.mean * mean
    length = tokens if train.packing and kernel == attention.EAGER else weighted * amounts.mean
    return Batch(tokens, length, kernel, amounts.supervised / mean)


@dataclass(frozen=True)
class _Passes:
    """Counts forward passes over examples.

    Attributes:
        kernel: name of the attention implementation.
        width: bytes of a value in matrix products.
    """

    model: Model
    amounts: Amounts
    kernel: str
    width: int
    is_packed: bool

    def over(self, examples: int, mean: float, batch_size: int, devices: int = 1) -> Work:
        """Count the passes over `examples` examples of `mean` tokens. Each device runs its share of the batches."""
        batches = math.ceil(examples / batch_size)
        if not batches:
            return Work()
        one = self.batch(examples / batches, mean, batch_size)
        done = work.forward(self.model, one, width=self.width, is_packed=self.is_packed)
        return done.times(math.ceil(batches / devices))

    def batch(self, examples: float, mean: float, batch_size: int) -> Batch:
        """Return a batch of `examples` examples, padded to the longest of `batch_size` examples."""
        longest, weighted = self.amounts.lengths.longest_of(batch_size)
        return Batch(examples * longest * mean, weighted * mean, self.kernel, 1 / longest)


def _inference(model: Model, amounts: Amounts, devices: Devices, dtype: str, *, is_packed: bool) -> _Passes:
    kernel = attention.for_inference_on(torch_dtype(dtype), devices.capability)
    return _Passes(model, amounts, kernel, bytes_per_value(dtype), is_packed)


def model_bytes(model: Model, *, is_packed: bool) -> int:
    """Return the size of a model's weights on disk, in bytes. BF16 if they are not packed."""
    return loaded_bytes(model.shape, _WIDTH, stays_packed=is_packed)


def rounding(plan: Plan, config: GptOssJson, amounts: Amounts, needed: NeedFigures, devices: Devices) -> Work:
    """Count the work of `quantize` on one device. Arguments are those of `training`, and the needs of the run."""
    model, asked = Model.of(config, plan.model_path), plan.quantize
    name, first = first_training(asked.source, plan.sft, plan.qat)
    is_packed = plan.is_packed(name, config)
    runs = _inference(model, amounts, devices, TRAIN_TYPES[first.precision], is_packed=is_packed)
    samples = min(asked.calibration_samples or CALIBRATION_SAMPLES, amounts.train_examples)
    total = runs.over(samples, amounts.mean, asked.batch_size)
    if writes_rounded(asked) or plan.rounds_base:
        total += Work(memory_bytes=4 * _WIDTH * model.expert_values, disk_bytes=needed["disk_bytes"]["quantize"])
        total += Work(disk_bytes=model_bytes(model, is_packed=is_packed))
    if asked.method in (RoundingMethod.gptq, RoundingMethod.auto):
        tokens = _calibrated(model, asked, amounts)
        passes = runs.over(math.ceil(tokens / max(amounts.mean, 1)), amounts.mean, asked.batch_size)
        total += work.gptq(model, tokens) + passes.times(2)  # for the inputs, and through the rounded layers
    if asked.method is RoundingMethod.auto:
        chosen = min(asked.auto_samples, amounts.validation_examples)
        total += runs.over(chosen, amounts.validation_mean, asked.batch_size).times(_CANDIDATES + 1)
    return total


def _calibrated(model: Model, asked: QuantizeConfig, amounts: Amounts) -> float:
    """Return the number of tokens that calibrate GPTQ."""
    if asked.calibration_samples is not None:
        return min(asked.calibration_samples, amounts.train_examples) * amounts.mean
    s = model.shape
    inputs = max(s.hidden_size, s.intermediate_size)
    return min(calibration_tokens(asked, inputs, s.num_local_experts, model.experts_per_token), amounts.train_tokens)


def evaluation(
    plan: Plan, asked: Inference, config: GptOssJson, amounts: Amounts, devices: Devices, *, models: int
) -> Work:
    """Count the work of `evaluate` for `models` models on one device: validation loss and generated answers.

    Answers count with evaluate.generation.max_new_tokens tokens, so the work is an upper bound. Task suites and models
    on servers are not included.
    """
    model, evaluate = Model.of(config, plan.model_path), asked.evaluate
    is_packed = plan.starts_packed(is_mxfp4=is_quantized(config))
    runs = _inference(model, amounts, devices, _STORED[asked.dtype], is_packed=is_packed)
    count = min(evaluate.max_samples or amounts.validation_examples, amounts.validation_examples)
    one = runs.over(count, amounts.validation_mean, evaluate.batch_size)
    one += Work(disk_bytes=model_bytes(model, is_packed=is_packed))
    if evaluate.generate:
        answers = amounts.prompts * evaluate.generation.samples
        size = min(evaluate.generation.batch_size, max(answers, 1))
        one += work.generation(
            model,
            answers,
            batch_size=size,
            new_tokens=evaluate.generation.max_new_tokens,
            prompt=runs.batch(size, amounts.mean / 2, size),  # prompts are not measured: half of an example
            width=runs.width,
            is_packed=is_packed,
        )
    return one.times(models)


def of_stages(
    plan: Plan,
    asked: Inference,
    config: GptOssJson,
    amounts: Amounts,
    *,
    needed: NeedFigures,
    devices: Devices,
) -> dict[str, Work]:
    """Count the work of each stage on its busiest device, by the stage's name. Stages that take seconds are left out.

    Args:
        plan, config, amounts, devices: as for `training`.
        asked: settings of verify and evaluate.
        needed: needs of the run, for the bytes on disk.
    """
    model, disk = Model.of(config, plan.model_path), needed["disk_bytes"]
    is_mxfp4 = is_quantized(config)
    source = model_bytes(model, is_packed=is_mxfp4)
    whole = model_bytes(model, is_packed=plan.starts_packed(is_mxfp4=is_mxfp4))
    trained = {name: training(plan, name, config, amounts, devices) for name in plan.trainings}
    values = Work(memory_bytes=4 * _WIDTH * model.expert_values)  # decode and encode: read and write twice
    found = {Stage.upcast.name: Work(disk_bytes=source + disk["upcast"]) if disk["upcast"] else Work()}
    found |= {name: trained[name] for name in trained if name == Stage.sft.name}
    if Stage.qat.name in plan.trainings:
        rounded = rounding(plan, config, amounts, needed, devices)
        found |= {Stage.quantize.name: rounded, Stage.qat.name: trained["qat"]}
    found[Stage.export.name] = values + Work(disk_bytes=source + whole + disk["export"])
    runs = _inference(model, amounts, devices, _BF16, is_packed=is_mxfp4)
    checked = runs.over(2 * asked.samples, amounts.mean, 1)
    found[Stage.verify.name] = values + checked + Work(disk_bytes=2 * source + whole + 2 * disk["export"])
    # The models are upcast and export, quantize, the trained ones, and adapters that another program trained.
    count = 2 + (Stage.qat.name in plan.trainings) + len(trained) + (plan.quantize.adapters is not None)
    found[Stage.evaluate.name] = evaluation(plan, asked, config, amounts, devices, models=count)
    return found
