"""Peak memory measured with fake tensors, in processes that pretend to have a GPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import DistillationConfig, LoraConfig, Method, Precision, QatConfig, Sharding, TrainConfig
from pipeline.doctor import peaks
from pipeline.doctor.fake_run import Job
from pipeline.doctor.peaks import NotMeasured, Peaks
from pipeline.numerics.formats import MXFP4

LAYERS = 6
MODEL = {
    "model_type": "gpt_oss",
    "num_hidden_layers": LAYERS,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2048,
    "pad_token_id": 0,
}
LORA: dict[str, Any] = {"method": Method.lora, "precision": Precision.bf16}
SFT = Job(MODEL, "sft", TrainConfig(**LORA), 512, None, 0, Sharding.none, 1)
QAT = replace(SFT, stage="qat", train=QatConfig(**LORA), block_format=MXFP4)


def measured(*jobs: Job) -> list[Peaks]:
    found = peaks.measure(jobs)
    assert all(isinstance(each, Peaks) for each in found), found
    return [each for each in found if isinstance(each, Peaks)]


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(every_nth=2)], ids=["all layers", "every second layer"])
def test_two_and_four_layers_predict_six(lora: LoraConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    job = replace(SFT, train=TrainConfig(**LORA, lora=lora))
    (predicted,) = measured(job)
    monkeypatch.setattr(peaks, "_MORE", LAYERS)  # then the model of six layers is measured whole
    (exact,) = measured(job)
    for phase, size in vars(exact).items():
        assert getattr(predicted, phase) == pytest.approx(size, rel=0.002), phase


EXPERT_VALUES = LAYERS * 8 * 3 * 256 * 256


def taught(train: QatConfig) -> QatConfig:
    """Return the settings with distillation."""
    return replace(train, distillation=DistillationConfig(weight=0.5))


def test_quantizers_and_a_cache_take_memory() -> None:
    sft, qat, cached = measured(SFT, QAT, replace(QAT, cache_bytes=float("inf")))
    assert sft.highest <= qat.highest < cached.highest  # the peak of both may be in attention, which is equal
    assert cached.highest - qat.highest > 0.5 * 2 * EXPERT_VALUES


def test_a_teacher_takes_memory_unless_it_shares_the_base() -> None:
    lora, full = QatConfig(**LORA), QatConfig(precision=Precision.bf16)
    jobs = [replace(QAT, train=train) for train in (lora, taught(lora), full, taught(full))]
    alone, shared, trained, with_second_model = measured(*jobs)
    assert shared.load == alone.load
    assert with_second_model.load - trained.load > 2 * EXPERT_VALUES


def test_a_teacher_with_fp32_weights_computes_in_bf16_under_mixed_precision() -> None:
    mixed = QatConfig(precision=Precision.mixed_bf16)
    alone, taught_by_fp32 = measured(replace(QAT, train=mixed), replace(QAT, train=taught(mixed)))
    assert taught_by_fp32.load - alone.load > 4 * EXPERT_VALUES


def test_a_rank_of_four_holds_a_quarter_of_the_weights_and_states() -> None:
    full = replace(SFT, train=TrainConfig(gradient_accumulation_steps=1))
    alone, sharded = measured(full, replace(full, sharding=Sharding.fsdp2, processes=4))
    assert sharded.load == pytest.approx(alone.load / 4, rel=0.05)
    assert sharded.optimizer == pytest.approx(alone.optimizer / 4, rel=0.1)


def test_layers_that_stay_gathered_take_bf16_memory_until_the_backward_pass() -> None:
    job = replace(SFT, train=TrainConfig(gradient_accumulation_steps=1), sharding=Sharding.fsdp2, processes=4)
    freed, kept = measured(job, replace(job, train=replace(job.train, reshard_after_forward=False)))
    assert kept.load == freed.load
    assert kept.forward - freed.forward > 2 * EXPERT_VALUES * (LAYERS - 2) / LAYERS


def test_without_a_compiler_the_reason_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # an earlier run may have left the compiled library in the usual place
    monkeypatch.setenv("CXX", "no-such-compiler")
    (found,) = peaks.measure([SFT])
    assert isinstance(found, NotMeasured)
    assert "no C++ compiler: no-such-compiler cannot be started" in found.reason


def test_deepspeed_is_not_measured() -> None:
    (found,) = peaks.measure([replace(SFT, sharding=Sharding.zero3, processes=2)])
    assert found == NotMeasured("sharding=zero3 cannot run without a GPU")
