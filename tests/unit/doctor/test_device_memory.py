"""If a model is too small to be measured, the memory of each GPU is estimated."""

from dataclasses import replace
from typing import Any

from pipeline.checkpoints.gpt_oss import Shape
from pipeline.config import (
    DataConfig,
    Experts,
    FormatConfig,
    FormatName,
    Method,
    Precision,
    QatConfig,
    Sharding,
    TrainConfig,
)
from pipeline.doctor import device_memory, needs, remedies
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


def find(
    stage: str = "sft", plan: Plan = PLAN, processes: int = 1, gpus: int = 1, model: dict[str, Any] = MODEL
) -> dict[str, int]:
    found = remedies.find(plan, stage, model, LONGEST, processes=processes, gpus=gpus)
    assert not any(each.is_measured for each in found)
    return {each.setting: each.bytes for each in found}


def test_each_remedy_names_the_memory_that_its_setting_leads_to() -> None:
    found = find()
    assert list(found) == [
        "sft.gradient_checkpointing=true",
        "sft.batch_size=1",
        "sharding=fsdp2 on 8 GPUs of this size",
        "data.max_length=512",
        "train@sft=bf16_parts",
        "train@sft=lora",
    ]
    assert found["sft.batch_size=1"] == bytes_of(replace(PLAN, sft=replace(SFT, batch_size=1)))
    assert found["sharding=fsdp2 on 8 GPUs of this size"] == bytes_of(
        replace(PLAN, sharding=Sharding.fsdp2), processes=8
    )
    shorter = device_memory.figures(replace(PLAN, data=DataConfig(max_length=512)), MODEL, LONGEST, 1)["sft"]
    assert found["data.max_length=512"] == shorter["bytes"] < bytes_of(PLAN)


def test_settings_that_the_run_has_already_are_no_remedies() -> None:
    small = replace(SFT, batch_size=1, gradient_checkpointing=True)
    sharded = replace(PLAN, sft=small, sharding=Sharding.fsdp2)
    assert list(find(plan=sharded, processes=2)) == ["data.max_length=512", "train@sft=bf16_parts", "train@sft=lora"]


def test_bf16_parts_have_adapters_as_a_remedy_and_are_none_for_decoded_experts() -> None:
    settings = replace(SFT, batch_size=1, gradient_checkpointing=True)
    parts = replace(PLAN, sft=replace(settings, method=Method.bf16_parts))
    found = find(plan=parts, model={**MODEL, "quantization_config": {}})
    assert "train@sft=lora" in found and "train@sft=bf16_parts" not in found
    assert "train@sft=bf16_parts" not in find(plan=replace(PLAN, experts=Experts.bf16))


def test_bf16_parts_as_a_remedy_of_qat_train_on_the_experts_that_quantize_then_packs() -> None:
    parts = replace(PLAN, qat=replace(PLAN.qat, method=Method.bf16_parts))
    assert find("qat", PLAN)["train@qat=bf16_parts"] == bytes_of(parts, "qat")
    assert parts.is_packed("qat", MODEL)


def test_without_rounding_no_qat_is_planned() -> None:
    parts = replace(PLAN, sft=replace(SFT, method=Method.bf16_parts))
    assert list(parts.trainings) == ["sft"]
    assert list(replace(parts, format=NVFP4).trainings) == ["sft", "qat"]


def test_layers_that_stay_gathered_take_memory_that_resharding_saves() -> None:
    sharded = replace(PLAN, sharding=Sharding.fsdp2)
    kept = replace(sharded, sft=replace(SFT, reshard_after_forward=False))
    found = find(plan=kept, processes=2)
    assert found["sft.reshard_after_forward=true"] == bytes_of(sharded, processes=2) < bytes_of(kept, processes=2)


def test_qat_can_do_without_its_cache_and_its_teacher() -> None:
    qat = QatConfig(**vars(SFT))
    qat.distillation.weight = 0.5
    found = find("qat", replace(PLAN, qat=qat))
    assert {"qat.rounded_cache_gib=0", "qat.distillation.weight=0"} <= found.keys()


def test_sharding_is_proposed_for_the_gpus_of_the_machine() -> None:
    assert "sharding=fsdp2 on 4 GPUs of this size" in find(gpus=4)


def test_packed_experts_are_proposed_for_adapters_on_decoded_ones() -> None:
    lora = TrainConfig(method=Method.lora, precision=Precision.bf16)
    decoded = replace(PLAN, sft=lora, qat=QatConfig(**vars(lora)), experts=Experts.bf16)
    packed, mxfp4 = replace(decoded, experts=Experts.packed), {**MODEL, "quantization_config": {}}
    for stage in ("sft", "qat"):
        found = find(stage, decoded, model=mxfp4)
        assert next(iter(found)) == "upcast.experts=packed"
        assert found["upcast.experts=packed"] == bytes_of(packed, stage) < bytes_of(decoded, stage)
    assert next(iter(find(plan=decoded))) == "upcast.experts=packed if the weights of model.path are MXFP4 values"
    for other in (packed, PLAN, replace(decoded, sft=SFT), replace(decoded, experts=None)):
        assert not any("upcast.experts" in setting for setting in find(plan=other, model=mxfp4)), other


def test_packed_experts_that_do_not_fit_have_remedies_too() -> None:
    lora = TrainConfig(method=Method.lora, precision=Precision.bf16, batch_size=2)
    plan = replace(PLAN, sft=lora, qat=QatConfig(**vars(lora)))
    found = find(plan=plan, model={**MODEL, "quantization_config": {}})
    assert list(found) == ["sft.batch_size=1", "sharding=fsdp2 on 8 GPUs of this size", "data.max_length=512"]
