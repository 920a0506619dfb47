"""The work of each stage is the work of its passes, updates and files. The expected values are computed by hand."""

from dataclasses import replace
from typing import Any

import pytest
from sizes import ACTIVE, FULL, LORA, MODEL, SMALL

from pipeline.config import (
    DataConfig,
    DistillationConfig,
    Dtype,
    EvaluateConfig,
    GenerationConfig,
    Precision,
    QatConfig,
    Sharding,
    TrainConfig,
)
from pipeline.doctor import needs, time, work
from pipeline.doctor.lengths import Amounts, LengthDistribution
from pipeline.doctor.plan import Plan
from pipeline.doctor.time import Devices, Inference, Schedule
from pipeline.doctor.work import Batch, Work
from pipeline.models.attention import EAGER, FUSED_SINKS

AMOUNTS = Amounts(train_examples=100, train_tokens=1000, validation_examples=10, validation_tokens=100)
EVEN = replace(AMOUNTS, lengths=LengthDistribution((0.0, 1.0), (0.0, 20.0)))  # lengths from 0 to 20, equally likely
CPU, GPU = Devices(), Devices(1, (9, 0))
NONE = {"is_packed": False, "rounds": False, "has_teacher": False}


def plan(train: TrainConfig, sharding: Sharding = Sharding.none) -> Plan:
    return Plan("model", DataConfig("data.jsonl", max_length=50), train, QatConfig(**vars(train)), sharding, "mxfp4")


def sft(train: TrainConfig, amounts: Amounts = AMOUNTS, devices: Devices = GPU, **more: Any) -> Work:
    return time.training(plan(train, **more), "sft", SMALL, amounts, devices)


def test_steps_follow_from_rows_batches_and_processes() -> None:
    train = replace(FULL, batch_size=2, gradient_accumulation_steps=5, epochs=2, eval_steps=8)
    assert Schedule.of(plan(train), "sft", AMOUNTS, 1) == Schedule(20, 2, 5, 1 + 3)
    assert Schedule.of(plan(train), "sft", AMOUNTS, 5) == Schedule(4, 2, 5, 1 + 1)
    packed = replace(train, packing=True)  # 1000 tokens in rows of 50: 10 passes of 10 examples
    assert Schedule.of(plan(packed), "sft", AMOUNTS, 1) == Schedule(4, 10, 5, 1 + 1)
    assert Schedule.of(plan(replace(train, max_steps=3)), "sft", AMOUNTS, 1).steps == 3


def test_training_is_passes_updates_validations_and_files() -> None:
    train = replace(FULL, batch_size=10, gradient_accumulation_steps=5, eval_steps=50, save_steps=50)  # 2 steps
    one = work.training_pass(MODEL, train, Batch(100, 10), **NONE)
    trained = needs.trained_parameters(MODEL.shape, train)
    update = Work(memory_bytes=2 * trained * (5 * 4 + 3 + 2 * 2))  # BF16, two states
    validation = work.forward(MODEL, Batch(100, 10), width=2, is_packed=False)
    disk = time.model_bytes(MODEL, is_packed=False) + needs.checkpoint(MODEL.shape, train)
    expected = one.times(10) + update.times(2) + validation.times(2) + Work(disk_bytes=disk)
    assert vars(sft(train)) == pytest.approx(vars(expected))


def test_a_validation_reads_the_weights_once_per_batch() -> None:
    train = replace(FULL, batch_size=4, eval_steps=50)
    once = work.forward(MODEL, Batch(100 / 3, 10), width=2, is_packed=False)  # 10 examples in 3 batches
    none = replace(AMOUNTS, validation_examples=0, validation_tokens=0)
    more = sft(train).memory_bytes - sft(train, none).memory_bytes
    assert more == pytest.approx(2 * 3 * once.memory_bytes)
    halved = sft(train, devices=Devices(2, (9, 0))).memory_bytes - sft(train, none, Devices(2, (9, 0))).memory_bytes
    assert halved == pytest.approx(2 * 2 * once.memory_bytes)  # one device runs two of the three batches


def test_padding_is_counted() -> None:
    """The longest of 3 even lengths up to 20 has 15 tokens. A batch of 3 then has 45 tokens, not 30."""
    train = replace(FULL, batch_size=3, max_steps=1, gradient_accumulation_steps=1, eval_steps=50)
    none = replace(EVEN, train_examples=99, train_tokens=990, validation_examples=0, validation_tokens=0)
    done, without = sft(train, none).flops, sft(train, replace(none, lengths=LengthDistribution())).flops
    logits = 4 * 2 * MODEL.head_values  # padding has no logits
    scores = [Batch(tokens, length) for tokens, length in ((45, 18.0 / 20 * 2 * 10 * 8 / 9), (30, 10))]
    expected = [
        each.tokens * (3 * 2 * (ACTIVE - MODEL.head_values) + 3.5 * MODEL.scores(each.length / 2)) + 30 * logits
        for each in scores
    ]
    assert [done, without] == pytest.approx(expected, rel=0.01)


def test_packed_rows_have_no_padding_and_documents_do_not_see_each_other() -> None:
    train = replace(FULL, batch_size=2, packing=True, max_steps=1, gradient_accumulation_steps=1)
    none = replace(AMOUNTS, validation_examples=0, validation_tokens=0)
    passes = {
        kernel: work.training_pass(MODEL, train, Batch(100, length, kernel), **NONE).flops
        for kernel, length in ((FUSED_SINKS, 10), (EAGER, 100))
    }
    assert sft(train, none).flops == pytest.approx(passes[FUSED_SINKS])
    assert sft(replace(train, attn_implementation=EAGER), none).flops == pytest.approx(passes[EAGER])


def test_a_cpu_runs_eager_attention() -> None:
    assert sft(FULL, devices=CPU).flops > sft(FULL, devices=GPU).flops


def test_fp32_training_and_its_validations_are_fp32() -> None:
    done = sft(replace(FULL, precision=Precision.fp32, attn_implementation=FUSED_SINKS))
    assert done.flops == 0 and done.fp32_flops == pytest.approx(sft(FULL).flops)


@pytest.mark.parametrize(("sharding", "shards"), [(Sharding.none, 1), (Sharding.zero2, 4), (Sharding.fsdp2, 4)])
def test_only_sharding_divides_the_optimizer(sharding: Sharding, shards: int) -> None:
    train = replace(FULL, batch_size=5, gradient_accumulation_steps=5, max_steps=1)
    states = needs.state_bytes(MODEL.shape, train)
    heavier = replace(train, optimizer="sgd")  # no states
    devices = Devices(4, (9, 0))
    less = sft(train, devices=devices, sharding=sharding).memory_bytes
    less -= sft(heavier, devices=devices, sharding=sharding).memory_bytes
    assert less == pytest.approx(2 * states / shards)


def test_the_teacher_adds_a_forward_pass() -> None:
    train = replace(FULL, batch_size=10, gradient_accumulation_steps=1)
    taught = QatConfig(**{**vars(train), "distillation": DistillationConfig(weight=0.5)})
    plain, more = (
        time.training(replace(plan(train), qat=qat), "qat", SMALL, AMOUNTS, GPU).flops
        for qat in (QatConfig(**vars(train)), taught)
    )
    assert more - plain == pytest.approx(10 * work.forward(MODEL, Batch(100, 10), width=2, is_packed=False).flops)


def test_evaluation_runs_batches_and_answers_prompts_in_the_type_of_model_dtype() -> None:
    evaluate = EvaluateConfig(batch_size=4, generate=True, generation=GenerationConfig(max_new_tokens=6, batch_size=2))
    amounts = replace(AMOUNTS, prompts=3)

    def done(dtype: Dtype) -> Work:
        return time.evaluation(plan(LORA), Inference(evaluate, 1, dtype), SMALL, amounts, GPU, models=5)

    losses = work.forward(MODEL, Batch(100 / 3, 10), width=2, is_packed=False).times(3)
    asked = Batch(2 * 5, 5)
    answers = work.generation(MODEL, 3, batch_size=2, new_tokens=6, prompt=asked, width=2, is_packed=False)
    expected = (losses + answers + Work(disk_bytes=time.model_bytes(MODEL, is_packed=False))).times(5)
    assert vars(done(Dtype.bfloat16)) == pytest.approx(vars(expected))
    assert done(Dtype.float32).flops == 0 and done(Dtype.float32).fp32_flops > 0
