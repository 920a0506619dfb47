"""The estimated time of each stage follows from FLOPs, bytes and speeds. The expected values are computed by hand."""

from dataclasses import replace
from typing import Any

import pytest
from test_needs import RELEASED_CONFIG

from pipeline.config import (
    DataConfig,
    DistillationConfig,
    LoraConfig,
    LoraTarget,
    Method,
    Precision,
    QatConfig,
    Sharding,
    TrainConfig,
)
from pipeline.config.gpus import GPUS, recognize_gpu
from pipeline.doctor import time, timetable, work
from pipeline.doctor.plan import Plan
from pipeline.doctor.time import Amounts, Schedule, Speed
from pipeline.doctor.timetable import Timetable
from pipeline.doctor.work import Model, Work
from pipeline.runs.gpus import Gpu

SMALL: dict[str, Any] = {
    "model_type": "gpt_oss",
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_local_experts": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "vocab_size": 10,
}
MODEL = Model.of(SMALL, "model")
ATTENTION, ROUTER, HEAD, EXPERT = 2 * 4 * 2 * (2 + 1), 4 * 4, 4 * 10, 3 * 4 * 8
DENSE, EXPERTS = ATTENTION + ROUTER + HEAD, 4 * EXPERT
ACTIVE = DENSE + 2 * EXPERT
FULL = TrainConfig(precision=Precision.bf16, gradient_checkpointing=False)
LORA = replace(FULL, method=Method.lora, lora=LoraConfig(rank=3, targets=[LoraTarget.experts]))
AMOUNTS = Amounts(train_examples=100, train_tokens=1000, validation_examples=10, validation_tokens=100)


def plan(train: TrainConfig) -> Plan:
    return Plan(
        "model", DataConfig("data.jsonl", max_length=50), train, QatConfig(**vars(train)), Sharding.none, "mxfp4"
    )


def training_pass(train: TrainConfig, **more: Any) -> Work:
    usual = {"is_packed": False, "rounds": False, "has_teacher": False}
    return work.training_pass(MODEL, train, 10, 0, **{**usual, **more})


def test_the_released_models_have_the_active_parameters_of_their_model_card() -> None:
    """The card of gpt-oss-20b says 3.6 B, and the card of gpt-oss-120b says 5.1 B."""
    large = {**RELEASED_CONFIG, "num_hidden_layers": 36, "num_local_experts": 128}
    models = [Model.of({**config, "num_experts_per_tok": 4}, "") for config in (RELEASED_CONFIG, large)]
    assert [round(model.active_values / 1e9, 1) for model in models] == [3.6, 5.1]


def test_a_forward_pass_has_two_flops_per_active_value_and_reads_all_weights() -> None:
    assert (MODEL.dense_values, MODEL.expert_values, MODEL.active_values) == (DENSE, EXPERTS, ACTIVE)
    done = work.forward(MODEL, 10, 0, width=2, is_packed=False)
    assert (done.flops, done.memory_bytes) == (10 * 2 * ACTIVE, 2 * (DENSE + EXPERTS))


def test_attention_grows_with_the_context_up_to_the_window() -> None:
    sliding = Model.of({**SMALL, "layer_types": ["sliding_attention"], "sliding_window": 5}, "")
    assert MODEL.scores(20) == 4 * 2 * 2 * 20 and sliding.scores(20) == 4 * 2 * 2 * 5


def test_packed_experts_are_read_decoded_and_read_again() -> None:
    done = work.forward(MODEL, 10, 0, width=2, is_packed=True)
    assert done.memory_bytes == 2 * DENSE + EXPERTS * (17 / 32 + 2 + 2)


def test_full_training_takes_three_forward_passes_and_checkpointing_one_more() -> None:
    forward = 10 * 2 * ACTIVE
    assert training_pass(FULL).flops == 3 * forward
    again = training_pass(replace(FULL, gradient_checkpointing=True))
    assert again.flops == 4 * forward - 10 * 2 * HEAD
    assert again.memory_bytes == 3 * 2 * (DENSE + EXPERTS)


def test_adapters_have_no_weight_gradients_of_the_base() -> None:
    adapters = 2 * 3 * (4 + 16 + 8 + 4)  # two experts, rank 3, (in + out) of gate_up and of down
    assert work.adapter_values(MODEL, LORA) == adapters
    assert training_pass(LORA).flops == 10 * (2 * 2 * ACTIVE + 3 * 2 * adapters)


def test_frozen_experts_have_no_weight_gradients() -> None:
    assert training_pass(replace(FULL, method=Method.bf16_parts)).flops == 10 * (2 * 2 * ACTIVE + 2 * DENSE)


def test_qat_rounds_the_changing_experts_and_the_teacher_runs_forward() -> None:
    plain = training_pass(FULL)
    assert training_pass(FULL, rounds=True).memory_bytes - plain.memory_bytes == 2 * 2 * EXPERTS
    assert training_pass(FULL, has_teacher=True).flops - plain.flops == 10 * 2 * ACTIVE
    assert training_pass(LORA, rounds=True).flops - training_pass(LORA).flops == 2 * 3 * EXPERTS


def test_generation_reads_the_weights_and_the_cache_at_each_step() -> None:
    done = work.generation(MODEL, 6, batch_size=2, new_tokens=5, context=7, width=2, is_packed=False)
    chosen = 1 - (1 - 2 / 4) ** 2  # share of the experts that two tokens choose
    cache = 2 * 7 * 2 * 1 * 1 * 2 * 2
    assert done.memory_bytes == 3 * 5 * (2 * DENSE + chosen * 2 * EXPERTS + cache)


def test_steps_follow_from_rows_batches_and_processes() -> None:
    train = replace(FULL, batch_size=2, gradient_accumulation_steps=5, epochs=2, eval_steps=8)
    assert Schedule.of(plan(train), "sft", AMOUNTS, 1) == Schedule(20, 1000 / 50, 5, 1 + 3)
    assert Schedule.of(plan(train), "sft", AMOUNTS, 5) == Schedule(4, 1000 / 50, 5, 1 + 1)
    packed = replace(train, packing=True)  # 1000 tokens in rows of 50
    assert Schedule.of(plan(packed), "sft", AMOUNTS, 1) == Schedule(4, 1000 / 10, 5, 1 + 1)
    assert Schedule.of(plan(replace(train, max_steps=3)), "sft", AMOUNTS, 1).steps == 3


def test_training_is_steps_validations_and_files() -> None:
    train = replace(FULL, batch_size=10, gradient_accumulation_steps=1, save_steps=50)
    done = time.training(plan(train), "sft", SMALL, AMOUNTS, 1)
    context = 5.0
    forward = MODEL.forward(context)
    assert done.flops == pytest.approx(1000 * (2 * forward + 2 * ACTIVE) + 100 * 2 * forward)
    assert time.training(plan(train), "sft", SMALL, AMOUNTS, 2).flops == pytest.approx(done.flops / 2)
    taught = replace(plan(train), qat=QatConfig(**{**vars(train), "distillation": DistillationConfig(weight=0.5)}))
    more = time.training(taught, "qat", SMALL, AMOUNTS, 1).flops - done.flops
    assert more == pytest.approx(1000 * forward)


def test_seconds_are_the_sum_of_arithmetic_memory_and_disk() -> None:
    speed = Speed.of_gpu(GPUS["h100"], "")
    assert speed.seconds(Work(flops=0.3 * 989e12)) == pytest.approx(1)
    assert speed.seconds(Work(fp32_flops=0.03 * 989e12)) == pytest.approx(1)
    assert speed.seconds(Work(memory_bytes=0.5 * 3.35e12, disk_bytes=2e9)) == pytest.approx(3)


def test_the_price_counts_every_gpu_for_the_whole_time() -> None:
    table = Timetable({"sft": 3600.0, "qat": 1800.0}, "h100", devices=8, price=2.5)
    assert table.cost == 2.5 * 8 * 1.5
    assert dict(table.lines())["cost"] == "estimate: 30.00 for 12.0 GPU hours at 2.5 each"
    assert dict(table.lines())["  together"] == "1 h 30 min on 8 GPUs"
    assert "cost" not in dict(Timetable({"sft": 1.0}, "h100", 1).lines())


def test_gpus_are_recognized_by_the_name_of_the_driver() -> None:
    names = {
        "h100": "NVIDIA H100 80GB HBM3",
        "a100": "NVIDIA A100-SXM4-80GB",
        "rtx4090": "NVIDIA GeForce RTX 4090",
        "l40s": "NVIDIA L40S",
        "l4": "NVIDIA L4",
    }
    assert {name: recognize_gpu(name) for name in names.values()} == {each: GPUS[key] for key, each in names.items()}
    assert recognize_gpu("NVIDIA T4") is None and recognize_gpu("NVIDIA A100-SXM4-40GB") is None


def test_an_unknown_gpu_has_no_estimate_unless_another_is_planned_for() -> None:
    unknown = (Gpu("NVIDIA T4", (7, 5), 16 * 10**9),)
    assert timetable.speed_of(None, unknown) is None
    planned = timetable.speed_of("h100", unknown)
    assert planned is not None and planned.flops == 0.3 * 989e12
    measured = timetable.speed_of(None, ())
    assert measured is not None and measured.flops > 1e8 and "CPU" in measured.name
