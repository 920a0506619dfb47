"""If a model is too small to be measured, the memory of each GPU is estimated."""

from dataclasses import replace
from typing import Any

import pytest

from pipeline.checkpoints.gpt_oss import Shape
from pipeline.config import (
    DataConfig,
    FormatConfig,
    FormatName,
    Method,
    Precision,
    QatConfig,
    Sharding,
    TrainConfig,
)
from pipeline.doctor import device_memory, needs
from pipeline.doctor.fake_run import Job
from pipeline.doctor.peaks import Peaks
from pipeline.doctor.plan import Plan

MODEL: dict[str, Any] = {
    "model_type": "gpt_oss",
    "num_experts_per_tok": 2,
    **vars(Shape(4, 64, 64, 4, 4, 2, 16, 512)),
}
SFT = TrainConfig(precision=Precision.fp32, batch_size=8, gradient_checkpointing=False)
PLAN = Plan("model", DataConfig(max_length=2048), SFT, QatConfig(**vars(SFT)), Sharding.none, "mxfp4")
NVFP4 = FormatConfig(FormatName["nvfp4"])
LONGEST = 1024


def bytes_of(plan: Plan, stage: str = "sft", processes: int = 1) -> int:
    return device_memory.figures(plan, MODEL, LONGEST, processes)[stage]["bytes"]


def test_an_estimate_says_why_it_is_one() -> None:
    found = device_memory.figures(PLAN, MODEL, LONGEST, 1)["sft"]
    assert found["estimated_because"] == "the model has fewer than 1,000,000,000 parameters"
    assert found["phases"] == {} and found["bytes"] == needs.of_stage(PLAN, "sft", MODEL, LONGEST).total


def test_only_sharded_parts_are_divided_between_processes() -> None:
    parts = needs.of_stage(PLAN, "sft", MODEL, LONGEST)
    zero2 = replace(PLAN, sharding=Sharding.zero2)
    divided = parts.gradients + parts.optimizer
    assert bytes_of(zero2, processes=1) - bytes_of(zero2, processes=2) == divided - (
        parts.gradients // 2 + parts.optimizer // 2
    )
    fsdp2 = replace(PLAN, sharding=Sharding.fsdp2)
    saved = bytes_of(fsdp2, processes=1) - bytes_of(fsdp2, processes=2)
    assert saved == divided + parts.weights - sum(
        size // 2 for size in (parts.gradients, parts.optimizer, parts.weights)
    )


def test_several_processes_without_sharding_reduce_a_copy_of_the_gradients() -> None:
    gradients = needs.of_stage(PLAN, "sft", MODEL, LONGEST).gradients
    assert bytes_of(PLAN, processes=2) - bytes_of(PLAN) == gradients


def test_a_teacher_is_counted() -> None:
    qat = QatConfig(**vars(SFT))
    qat.distillation.weight = 0.5
    taught = replace(PLAN, qat=qat)
    assert bytes_of(taught, "qat") - bytes_of(PLAN, "qat") == needs.of_stage(PLAN, "qat", MODEL, LONGEST).weights


def test_without_rounding_no_qat_is_planned() -> None:
    parts = replace(PLAN, sft=replace(SFT, method=Method.bf16_parts))
    assert list(parts.trainings) == ["sft"]
    assert list(replace(parts, format=NVFP4).trainings) == ["sft", "qat"]


@pytest.mark.parametrize(
    ("gib", "on_gpu", "kept", "added"), [(None, False, 0, 2**30), (None, True, 0, 0), (64, True, 2**36, 0)]
)
def test_a_full_cache_is_added_after_measuring_because_it_does_not_grow_with_the_layers(
    monkeypatch: pytest.MonkeyPatch, gib: float | None, on_gpu: bool, kept: int, added: int
) -> None:
    measured: list[Job] = []

    def measure(jobs: list[Job]) -> list[Peaks]:
        measured.extend(jobs)
        return [Peaks(load=10, forward=20, backward=30, optimizer=25) for _ in jobs]

    monkeypatch.setattr(device_memory.peaks, "measure", measure)
    model = {**MODEL, "num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 1024, "num_local_experts": 32}
    plan = replace(PLAN, qat=QatConfig(**vars(SFT), rounded_cache_gib=gib), on_gpu=on_gpu)
    found = device_memory.figures(plan, model, LONGEST, 1)["qat"]
    assert [job.cache_bytes for job in measured if job.stage == "qat"] == [kept]
    assert found["phases"] == {"load": 10, "forward": 20 + added, "backward": 30 + added, "optimizer": 25 + added}
    assert {job.on_gpu for job in measured} == {on_gpu}
