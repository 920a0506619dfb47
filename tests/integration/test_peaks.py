"""Peak memory measured with fake tensors, in processes that pretend to have a GPU."""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoints.gpt_oss import Shape, other_tensors
from pipeline.config import (
    DistillationConfig,
    LoraConfig,
    Method,
    Oscillation,
    Precision,
    QatConfig,
    Sharding,
    TrainConfig,
    adapted_layers,
)
from pipeline.doctor import needs, peaks
from pipeline.doctor.fake_run import Job, Size
from pipeline.doctor.peaks import NotMeasured, Peaks
from pipeline.numerics.formats import MXFP4
from pipeline.training.flips import BYTES_PER_WEIGHT

LAYERS, DEEP = 4, 6
"""Layers of the models. One of four layers is measured whole, and the peaks of a deeper one are extrapolated."""
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
PARTS: dict[str, Any] = {"method": Method.bf16_parts, "gradient_accumulation_steps": 1}
SFT = Job(MODEL, "sft", TrainConfig(**LORA), 512, None, 0, Sharding.none, 1)
QAT = replace(SFT, stage="qat", train=QatConfig(**LORA), block_format=MXFP4)

SHAPE = Shape.of(MODEL, "model")
EXPERT_VALUES = LAYERS * 8 * 3 * 256 * 256


def taught(train: QatConfig) -> QatConfig:
    """Return the settings with distillation."""
    return replace(train, distillation=DistillationConfig(weight=0.5))


DEEP_SFT = replace(SFT, model={**MODEL, "num_hidden_layers": DEEP})
FULL_QAT, MIXED_QAT = (
    QatConfig(precision=precision, gradient_accumulation_steps=1)
    for precision in (Precision.bf16, Precision.mixed_bf16)
)
ONE_PASS = replace(SFT, train=TrainConfig(gradient_accumulation_steps=1))
SHARDED = replace(ONE_PASS, sharding=Sharding.fsdp2, processes=4)
SHARDED_QAT = replace(QAT, train=MIXED_QAT, sharding=Sharding.fsdp2, processes=4)
JOBS = {
    "sft": SFT,
    "deep": DEEP_SFT,
    "deep, every second layer": replace(DEEP_SFT, train=TrainConfig(**LORA, lora=LoraConfig(every_nth=2))),
    "qat": QAT,
    "qat, cached": replace(QAT, cache_bytes=float("inf")),
    "qat, taught": replace(QAT, train=taught(QatConfig(**LORA))),
    "full": replace(QAT, train=FULL_QAT),
    "full, taught": replace(QAT, train=taught(FULL_QAT)),
    "mixed": replace(QAT, train=MIXED_QAT),
    "mixed, held": replace(QAT, train=replace(MIXED_QAT, oscillation=Oscillation.hold)),
    "mixed, taught": replace(QAT, train=taught(MIXED_QAT)),
    "parts": replace(SFT, train=TrainConfig(**PARTS), is_packed=True),
    "parts, qat": replace(QAT, train=QatConfig(**PARTS), is_packed=True),
    "parts, sharded": replace(SFT, train=TrainConfig(**PARTS), is_packed=True, sharding=Sharding.fsdp2, processes=4),
    "one pass": ONE_PASS,
    "sharded": SHARDED,
    "qat, sharded": SHARDED_QAT,
    "qat, sharded, held": replace(SHARDED_QAT, train=replace(MIXED_QAT, oscillation=Oscillation.hold)),
    "8-bit": replace(SFT, train=TrainConfig(**LORA, optimizer="adamw_torch_8bit")),
    "8-bit, sharded": replace(SHARDED, train=replace(SHARDED.train, optimizer="adamw_torch_8bit")),
    "sharded, gathered": replace(SHARDED, train=replace(SHARDED.train, reshard_after_forward=False)),
}


BROKEN = replace(SFT, train=TrainConfig(**LORA, optimizer="no_such_optimizer"))
EXACT = ("deep", "deep, every second layer")


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        broken: result of BROKEN, which is the first job.
        found: peaks of JOBS. Those of EXACT are computed from models of two and four layers.
        exact: peaks of EXACT, measured with all six layers.
    """

    broken: Peaks | NotMeasured
    found: dict[str, Peaks | NotMeasured]
    exact: dict[str, Peaks | NotMeasured]


@pytest.fixture(scope="module")
def measured() -> Measured:
    """Measure all jobs together, so that the libraries are imported only once."""
    whole = [replace(JOBS[name]) for name in EXACT]
    sizes = peaks._sizes

    def sizes_or_whole(job: Job) -> list[Size]:
        return [Size(DEEP, adapted(job))] if any(job is each for each in whole) else sizes(job)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(peaks, "_sizes", sizes_or_whole)
        broken, *others = peaks.measure([BROKEN, *JOBS.values(), *whole])
    return Measured(
        broken,
        dict(zip(JOBS, others[: len(JOBS)], strict=True)),
        dict(zip(EXACT, others[len(JOBS) :], strict=True)),
    )


def adapted(job: Job) -> int:
    return len(adapted_layers(job.train.lora, DEEP))


@pytest.fixture(scope="module")
def found(measured: Measured) -> dict[str, Any]:
    assert [each for each in measured.found.values() if isinstance(each, NotMeasured)] == []
    return measured.found


@pytest.fixture(scope="module")
def exact(measured: Measured) -> dict[str, Any]:
    assert [each for each in measured.exact.values() if isinstance(each, NotMeasured)] == []
    return measured.exact


@pytest.mark.parametrize("name", EXACT)
def test_two_and_four_layers_predict_six(name: str, found: dict[str, Peaks], exact: dict[str, Peaks]) -> None:
    for phase, size in vars(exact[name]).items():
        assert getattr(found[name], phase) == pytest.approx(size, rel=0.002), phase


def test_quantizers_and_a_cache_take_memory(found: dict[str, Peaks]) -> None:
    sft, qat, cached = (found[name].highest for name in ("sft", "qat", "qat, cached"))
    assert sft <= qat < cached  # the peak of both may be in attention, which is equal
    assert cached - qat > 0.5 * 2 * EXPERT_VALUES


def test_a_teacher_takes_memory_unless_it_shares_the_base(found: dict[str, Peaks]) -> None:
    assert found["qat, taught"].load == found["qat"].load
    assert found["full, taught"].load - found["full"].load > 2 * EXPERT_VALUES


def test_a_teacher_with_fp32_weights_computes_in_bf16_under_mixed_precision(found: dict[str, Peaks]) -> None:
    assert found["mixed, taught"].load - found["mixed"].load > 4 * EXPERT_VALUES


def test_holding_weights_takes_three_bytes_for_each_expert_weight(found: dict[str, Peaks]) -> None:
    for name, job, processes in (("mixed", "mixed, held", 1), ("qat, sharded", "qat, sharded, held", 4)):
        more, state = found[job].load - found[name].load, BYTES_PER_WEIGHT * EXPERT_VALUES / processes
        assert state <= more <= 1.25 * state, name  # a stack is rounded at the start, which takes temporary memory


def test_only_the_bf16_parts_have_fp32_copies_and_states(found: dict[str, Peaks]) -> None:
    others = sum(prod(info.shape) for info in other_tensors(SHAPE).values())
    packed = int(EXPERT_VALUES * MXFP4.bits_per_value / 8)
    assert found["parts"].load == pytest.approx(packed + 4 * others, rel=0.01)
    assert found["parts"].optimizer > packed + 16 * others
    assert found["parts, qat"].highest == pytest.approx(found["parts"].highest, rel=0.01)
    assert found["parts, sharded"].load == pytest.approx(found["parts"].load / 4, rel=0.05)


def test_8_bit_states_save_the_memory_that_is_estimated(found: dict[str, Peaks]) -> None:
    saved = _states("adamw_torch_fused") - _states("adamw_torch_8bit")
    for phase in ("forward", "backward"):
        assert getattr(found["sft"], phase) - getattr(found["8-bit"], phase) == pytest.approx(saved, rel=0.01)


def _states(optimizer: str) -> int:
    train = replace(SFT.train, optimizer=optimizer)
    return needs.memory(SHAPE, train, tokens=8, experts_per_token=4, is_quantized=False).optimizer


def test_8_bit_states_of_sharded_weights_are_sharded(found: dict[str, Peaks]) -> None:
    weights = found["sharded"].load
    assert found["sharded"].forward - found["8-bit, sharded"].forward == pytest.approx(1.5 * weights, rel=0.05)


def test_a_rank_of_four_holds_a_quarter_of_the_weights_and_states(found: dict[str, Peaks]) -> None:
    alone, sharded = found["one pass"], found["sharded"]
    assert sharded.load == pytest.approx(alone.load / 4, rel=0.05)
    assert sharded.optimizer == pytest.approx(alone.optimizer / 4, rel=0.1)


def test_layers_that_stay_gathered_take_bf16_memory_until_the_backward_pass(found: dict[str, Peaks]) -> None:
    freed, kept = found["sharded"], found["sharded, gathered"]
    assert kept.load == freed.load
    assert kept.forward - freed.forward > 2 * EXPERT_VALUES * (LAYERS - 2) / LAYERS


def test_a_job_that_fails_is_not_measured_and_the_others_are(measured: Measured) -> None:
    assert isinstance(measured.broken, NotMeasured) and measured.broken.reason.startswith("measuring failed: ")
    assert all(isinstance(each, Peaks) for each in measured.found.values())


def test_without_a_compiler_the_reason_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # an earlier run may have left the compiled library in the usual place
    monkeypatch.setenv("CXX", "no-such-compiler")
    (found,) = peaks.measure([SFT])
    assert isinstance(found, NotMeasured)
    assert "no C++ compiler: no-such-compiler cannot be started" in found.reason


def test_deepspeed_is_not_measured() -> None:
    (found,) = peaks.measure([replace(SFT, sharding=Sharding.zero3, processes=2)])
    assert found == NotMeasured("sharding=zero3 cannot run without a GPU")
