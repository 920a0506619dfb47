"""A teacher that shares the student's base gives the same bits as a separate SFT model. The student stays unchanged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.config import (
    DistillationConfig,
    ExpertsImplementation,
    LoraConfig,
    LoraTarget,
    Method,
    Precision,
    QatConfig,
    TinyConfig,
    TrainConfig,
)
from pipeline.models import adapters, chunked_logits, expert_kernels, fake_quantizers, loading, quantizer_calls, saving
from pipeline.models.adapted_names import is_factor
from pipeline.models.references import ModelRef
from pipeline.models.tiny_model import create_tiny
from pipeline.numerics.formats import FORMATS, MXFP4, BlockFormat
from pipeline.training import distillation
from pipeline.training.distillation import Teacher

IDS = torch.randint(1, 200, (2, 12), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
CHOSEN = torch.ones_like(IDS, dtype=torch.bool)
KERNEL = ExpertsImplementation.eager  # with it, transformers and ModelOpt add in the same order
EVERYTHING = LoraConfig(targets=[LoraTarget.attention, LoraTarget.experts])
ONE_LAYER = LoraConfig(targets=[LoraTarget.experts], layers=[1])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are not MXFP4 values, so that rounding changes them."""
    root = tmp_path_factory.mktemp("shared")
    create_tiny(root / "packed", TinyConfig())
    (root / "base").mkdir()
    saving.write_plain(ModelRef("tiny", root / "packed", root / "packed", dtype=torch.bfloat16), root / "base")
    generator = torch.Generator().manual_seed(3)
    for file in (root / "base").glob("*.safetensors"):
        weights = load_file(file)
        moved = {name: 1 + 0.2 * torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
        save_file({name: (weights[name] * moved[name]).bfloat16() for name in weights}, file, {"format": "pt"})
    return root / "base"


def adapt(model: Any, lora: LoraConfig, seed: int) -> Any:
    adapted = adapters.attach(model, TrainConfig(lora=lora), "sft")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if is_factor(name):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapted


def make_sft(base: Path, directory: Path, lora: LoraConfig | None, dtype: torch.dtype) -> ModelRef:
    """Make an SFT model: the base with random adapters.

    If `lora` is None, the SFT model is the base without adapters. It stands in for a fully trained model.
    """
    if lora is None:
        return ModelRef("sft", base, base, dtype=dtype)
    adapt(loading.load_plain(base, dtype), lora, seed=4).save_pretrained(str(directory))
    return ModelRef("sft", directory, base, adapter=True, dtype=dtype)


def make_student(base: Path, lora: LoraConfig, dtype: torch.dtype, block_format: BlockFormat = MXFP4) -> Any:
    student = adapt(loading.load_plain(base, dtype), lora, seed=5)
    fake_quantizers.insert(student, block_format, lambda quantized: quantized(input_ids=IDS))
    expert_kernels.use(student, KERNEL, block_format, Precision.bf16)
    fake_quantizers.keep_rounded(student, float("inf"), keeps_frozen=True)
    return student.train()


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        states = chunked_logits.compute_states(model, BATCH, CHOSEN)
    return logits(states)


def logits(states: chunked_logits.States) -> Tensor:
    assert states.head is not None
    return states.hidden @ states.head.T


def taught(student: nn.Module, sft: ModelRef) -> Tensor:
    teacher = distillation.share_base(sft, DistillationConfig(weight=0.5))
    return logits(distillation.compute_teacher_states(student, teacher, BATCH, CHOSEN))


@pytest.mark.parametrize(
    ("dtype", "lora", "block_format"),
    [
        (torch.float32, EVERYTHING, MXFP4),
        (torch.bfloat16, EVERYTHING, MXFP4),
        (torch.bfloat16, ONE_LAYER, MXFP4),
        (torch.bfloat16, None, MXFP4),
        (torch.bfloat16, EVERYTHING, FORMATS["nvfp4_w4a4"]),
    ],
)
def test_the_teachers_logits_have_the_bits_of_the_separate_sft_model(
    base: Path, tmp_path: Path, dtype: torch.dtype, lora: LoraConfig | None, block_format: BlockFormat
) -> None:
    sft = make_sft(base, tmp_path / "sft", lora, dtype)
    separate = loading.load_effective(sft, dtype)
    expert_kernels.use(separate, KERNEL, None, Precision.bf16)
    student = make_student(base, lora or EVERYTHING, dtype, block_format)
    found = taught(student, sft)
    assert torch.equal(found, logits_of(separate))
    assert not torch.allclose(found, logits_of(student), atol=1e-3)


def test_the_student_is_the_same_after_the_teacher_has_run(base: Path, tmp_path: Path) -> None:
    sft = make_sft(base, tmp_path / "sft", EVERYTHING, torch.float32)
    student = make_student(base, EVERYTHING, torch.float32)
    parameters = {name: (parameter, parameter.requires_grad) for name, parameter in student.named_parameters()}
    bits = {name: parameter.clone() for name, parameter in student.named_parameters()}
    before = logits_of(student)
    taught(student, sft)
    assert student.training
    after = dict(student.named_parameters())
    assert after.keys() == parameters.keys()
    for name, (parameter, is_trained) in parameters.items():
        assert after[name] is parameter and parameter.requires_grad is is_trained
        assert torch.equal(parameter, bits[name])
    assert torch.equal(logits_of(student), before)
    with quantizer_calls.watch(student) as fired:
        logits_of(student)
    fired.raise_unless_all(student)


def test_an_error_in_the_teachers_pass_leaves_the_students_adapters_in_place(base: Path, tmp_path: Path) -> None:
    sft = make_sft(base, tmp_path / "sft", EVERYTHING, torch.float32)
    student = make_student(base, EVERYTHING, torch.float32)
    before = logits_of(student)
    experts = student.get_submodule("base_model.model.model.layers.1.mlp.experts.base_layer.base_layer")

    def stop(*_: object) -> None:
        raise RuntimeError("stop")

    hook = experts.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        taught(student, sft)
    hook.remove()
    assert torch.equal(logits_of(student), before)


def test_the_students_gradients_do_not_depend_on_where_the_teacher_lives(base: Path, tmp_path: Path) -> None:
    sft = make_sft(base, tmp_path / "sft", EVERYTHING, torch.float32)
    separate = loading.load_effective(sft, torch.float32)
    expert_kernels.use(separate, KERNEL, None, Precision.fp32)
    gradients = []
    for teacher in (Teacher(separate, 0.5, 2.0), distillation.share_base(sft, DistillationConfig(0.5, 2.0))):
        student = make_student(base, EVERYTHING, torch.float32)
        student.gradient_checkpointing_enable({"use_reentrant": False})
        student.enable_input_require_grads()
        distillation.distill(student, teacher, {**BATCH, "labels": IDS}).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in student.named_parameters()})
    assert any(gradient is not None and gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient is None and other is None) or torch.equal(gradient, other), name


def test_only_a_lora_student_in_the_type_of_sft_shares_its_base_with_the_teacher() -> None:
    def holds(
        method: Method, precision: Precision, sft: torch.dtype, *, own: bool = False, weight: float = 0.5
    ) -> bool:
        settings = QatConfig(method=method, precision=precision, distillation=DistillationConfig(weight=weight))
        return distillation.holds_second_model(settings, sft, has_own_base=own)

    assert not holds(Method.lora, Precision.bf16, torch.bfloat16)
    assert not holds(Method.lora, Precision.fp32, torch.float32)
    assert holds(Method.lora, Precision.bf16, torch.float32)
    assert holds(Method.lora, Precision.bf16, torch.bfloat16, own=True)
    assert holds(Method.full, Precision.bf16, torch.bfloat16)
    assert holds(Method.full, Precision.mixed_bf16, torch.float32)
    assert not holds(Method.full, Precision.mixed_bf16, torch.float32, weight=0)
