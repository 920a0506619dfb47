"""Every kernel for the experts gives the loss and gradients of eager, in every precision, quantized or not."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, GptOssConfig

from pipeline.config import ExpertsImplementation, LoraConfig, LoraTarget, Precision, TrainConfig
from pipeline.errors import CheckFailed
from pipeline.models import adapters, expert_kernels, fake_quantizers
from pipeline.models.loading import TRAIN_DTYPES
from pipeline.numerics.formats import FORMATS, MXFP4, BlockFormat

IDS = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(1))
# Every token goes to every expert. Otherwise rounding could change the routing and hide errors of kernels.
EXPERTS = 4
EAGER, BATCHED, GROUPED = (ExpertsImplementation[name] for name in ("eager", "batched_mm", "grouped_mm"))


def gpt_oss(dtype: torch.dtype) -> Any:
    config = GptOssConfig(
        vocab_size=64,
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=EXPERTS,
        pad_token_id=0,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            scale = 0.1 if parameter.ndim == 1 or name.endswith("bias") else parameter.shape[1] ** -0.5
            parameter.copy_(1 + 0.1 * drawn if name.endswith("norm.weight") else drawn * scale)
    return model.to(dtype)


def results(
    implementation: ExpertsImplementation,
    dtype: torch.dtype,
    is_mixed: bool = False,
    block_format: BlockFormat | None = None,
    lora: LoraConfig | None = None,
) -> dict[str, Tensor]:
    """Compute the loss and every gradient, and check that all quantizers have run."""
    model = gpt_oss(dtype)
    if lora is not None:
        model = adapters.attach(model, TrainConfig(lora=lora), "sft")
    if block_format is not None:
        fake_quantizers.insert(model, block_format, lambda quantized: quantized(input_ids=IDS))
    expert_kernels.use(model, implementation, block_format)
    autocast = torch.autocast("cpu", torch.bfloat16) if is_mixed else nullcontext()
    with autocast, fake_quantizers.watch(model) if block_format is not None else nullcontext() as fired:
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    if fired is not None:
        fired.raise_unless_all(model)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def distances(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == truth.keys()
    return {name: float((found[name].double() - truth[name]).norm() / truth[name].norm()) for name in truth}


def of_all_gradients(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Compute the relative distance of all gradients as one vector.

    The distance of a single small gradient, such as the sinks', varies too much.
    """
    names = [name for name in truth if name != "loss"]
    whole, true = (torch.cat([each[name].double().flatten() for name in names]) for each in (found, truth))
    return float((whole - true).norm() / true.norm())


@pytest.mark.parametrize("implementation", [BATCHED, GROUPED])
@pytest.mark.parametrize("block_format", [None, MXFP4])
def test_in_fp32_loss_and_gradients_equal_eager(
    implementation: ExpertsImplementation, block_format: BlockFormat | None
) -> None:
    found, eager = (results(each, torch.float32, block_format=block_format) for each in (implementation, EAGER))
    assert max(distances(found, {name: value.double() for name, value in eager.items()}).values()) < 1e-5


@pytest.mark.parametrize("implementation", [BATCHED, GROUPED])
@pytest.mark.parametrize("precision", [Precision.mixed_bf16, Precision.bf16])
def test_in_bf16_loss_and_gradients_are_as_accurate_as_with_eager(
    implementation: ExpertsImplementation, precision: Precision
) -> None:
    truth = results(EAGER, torch.float64)
    dtype, is_mixed = TRAIN_DTYPES[precision], precision is Precision.mixed_bf16
    found, eager = (results(each, dtype, is_mixed) for each in (implementation, EAGER))
    assert distances(found, truth)["loss"] < 1e-3
    assert 1e-3 < of_all_gradients(eager, truth) < 0.1
    assert of_all_gradients(found, truth) < 1.5 * of_all_gradients(eager, truth)


@pytest.mark.parametrize("block_format", [None, MXFP4])
def test_under_mixed_precision_the_grouped_products_are_in_bf16(
    monkeypatch: pytest.MonkeyPatch, block_format: BlockFormat | None
) -> None:
    seen: set[torch.dtype] = set()

    def noting(values: Tensor, weight: Tensor, **others: Any) -> Tensor:
        seen.update((values.dtype, weight.dtype))
        return product(values, weight, **others)

    product = functional.grouped_mm
    monkeypatch.setattr(functional, "grouped_mm", noting)
    gradients = results(GROUPED, torch.float32, is_mixed=True, block_format=block_format)
    assert seen == {torch.bfloat16}
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


@pytest.mark.parametrize("implementation", [BATCHED, GROUPED])
def test_quantized_experts_with_adapters_get_the_gradients_of_eager(implementation: ExpertsImplementation) -> None:
    lora = LoraConfig(targets=[LoraTarget.experts])
    found, eager = (results(each, torch.float32, block_format=MXFP4, lora=lora) for each in (implementation, EAGER))
    assert any("lora_B" in name for name in eager)
    real = {name: value.double() for name, value in eager.items() if value.any()}  # A has no gradient while B is zero
    assert max(distances({name: found[name] for name in real}, real).values()) < 1e-5


def test_attaching_adapters_to_a_quantized_model_is_an_error() -> None:
    model = gpt_oss(torch.float32)
    fake_quantizers.insert(model, MXFP4, lambda quantized: quantized(input_ids=IDS))
    with pytest.raises(CheckFailed, match="Attach adapters before quantizers"):
        adapters.attach(model, TrainConfig(), "qat")


def test_quantizers_of_inputs_run_with_auto_and_batched_mm_but_not_with_grouped_mm() -> None:
    block_format = FORMATS["nvfp4_w4a4"]
    auto, batched = (
        results(each, torch.float32, block_format=block_format) for each in (ExpertsImplementation.auto, BATCHED)
    )
    assert distances(batched, {name: value.double() for name, value in auto.items()})["loss"] < 1e-4
    with pytest.raises(CheckFailed, match="down_proj_input_quantizer"):
        results(GROUPED, torch.float32, block_format=block_format)


def test_auto_is_grouped_mm_if_inputs_are_not_quantized() -> None:
    for block_format in (None, MXFP4):
        auto, grouped = (
            results(each, torch.float32, block_format=block_format) for each in (ExpertsImplementation.auto, GROUPED)
        )
        assert all(torch.equal(auto[name], grouped[name]) for name in grouped)
