"""Every kernel for the experts gives the same loss and gradients as `eager`, with and without quantization.

In BF16, the loss and the gradients are as accurate as with `eager`.

Factored adapters give the loss and gradients of PEFT's own forward pass, which adds the delta to the weights.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from pipeline.config import ExpertsImplementation, LoraConfig, LoraTarget, Precision, TrainConfig
from pipeline.errors import CheckFailed
from pipeline.models import adapters, expert_kernels, expert_products, fake_quantizers, quantizer_calls
from pipeline.models.adapted_names import is_factor
from pipeline.models.expert_products import Factors, Multiply
from pipeline.models.loading import TRAIN_DTYPES
from pipeline.numerics.formats import FORMATS, MXFP4, BlockFormat

IDS = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(1))
# Every token goes to every expert. Otherwise rounding could change the routing and hide errors of kernels.
EXPERTS = 4
ALSO_TRAINED = ("proj_bias", "router", "norm", "embed")
EAGER, BATCHED, GROUPED = (ExpertsImplementation[name] for name in ("eager", "batched_mm", "grouped_mm"))


ON_EXPERTS = LoraConfig(targets=[LoraTarget.experts])


def gpt_oss(dtype: torch.dtype, active: int = EXPERTS) -> Any:
    config = GptOssConfig(
        vocab_size=64,
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=active,
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
    is_factored: bool = False,
    active: int = EXPERTS,
) -> dict[str, Tensor]:
    """Compute the loss and every gradient, and check that all quantizers have run."""
    model = gpt_oss(dtype, active)
    if lora is not None:
        model = with_adapters(model, lora, is_factored)
    if block_format is not None:
        fake_quantizers.insert(model, block_format, lambda quantized: quantized(input_ids=IDS))
    precision = Precision.mixed_bf16 if is_mixed else Precision.fp32 if dtype.itemsize > 2 else Precision.bf16
    expert_kernels.use(model, implementation, block_format, precision)
    autocast = torch.autocast("cpu", torch.bfloat16) if is_mixed else nullcontext()
    with autocast, quantizer_calls.watch(model) if block_format is not None else nullcontext() as fired:
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    if fired is not None:
        fired.raise_unless_all(model)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def with_adapters(model: Any, lora: LoraConfig, is_factored: bool) -> Any:
    """Attach adapters with random factors. The experts' biases, routers, norms and embeddings are trainable too."""
    model = adapters.attach(model, TrainConfig(lora=lora), "sft", is_factored=is_factored)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            parameter.requires_grad_(is_factor(name) or any(part in name for part in ALSO_TRAINED))
    return model


def distances(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == truth.keys()
    return {name: float((found[name].double() - truth[name]).norm() / truth[name].norm()) for name in truth}


def of_all_gradients(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Join all gradients of each set into one vector, and compute the relative distance between the two vectors.

    Distances between single small gradients, such as those of the sinks, would vary too much for a test.
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
    found, eager = (
        results(each, torch.float32, block_format=MXFP4, lora=ON_EXPERTS) for each in (implementation, EAGER)
    )
    assert any("lora_B" in name for name in eager)
    assert max(distances(found, {name: value.double() for name, value in eager.items()}).values()) < 1e-5


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


@pytest.mark.parametrize("implementation", [EAGER, BATCHED, GROUPED])
@pytest.mark.parametrize(("rank", "active"), [(8, EXPERTS), (3, 2)])
def test_factored_adapters_give_the_loss_and_gradients_of_base_plus_delta(
    implementation: ExpertsImplementation, rank: int, active: int
) -> None:
    lora = LoraConfig(targets=[LoraTarget.experts, LoraTarget.attention], rank=rank)
    truth = results(EAGER, torch.float64, lora=lora, active=active)
    found = results(implementation, torch.float32, lora=lora, is_factored=True, active=active)
    trained = ("lora_A", "lora_B", *ALSO_TRAINED)
    assert all(any(part in name for name in truth) for part in trained)
    assert max(distances(found, truth).values()) < 4e-6
    if implementation is not GROUPED:  # torch has no grouped product in FP64
        exact = results(implementation, torch.float64, lora=lora, is_factored=True, active=active)
        assert max(distances(exact, truth).values()) < 1e-12


@pytest.mark.parametrize("implementation", [EAGER, BATCHED, GROUPED])
def test_in_one_layer_factored_gradients_differ_from_base_plus_delta_by_a_millionth_at_most(
    implementation: ExpertsImplementation,
) -> None:
    def gradients(dtype: torch.dtype, kernel: ExpertsImplementation, is_factored: bool) -> dict[str, Tensor]:
        model = with_adapters(gpt_oss(dtype, active=2), ON_EXPERTS, is_factored)
        expert_kernels.use(model, kernel, None, Precision.fp32)
        layer = adapters.base_of(model).model.layers[1].mlp
        generator = torch.Generator().manual_seed(3)
        states = torch.randn(1, 200, 64, generator=generator).to(dtype).requires_grad_()
        layer(states)[0].sin().sum().backward()
        trained = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.requires_grad}
        return {"states": states.grad, **trained}

    found = gradients(torch.float32, implementation, is_factored=True)
    assert len(found) == 9  # states, four factors, two biases of experts, and the router's weight and bias
    assert max(distances(found, gradients(torch.float64, EAGER, is_factored=False)).values()) < 1e-6


@pytest.mark.parametrize("implementation", [EAGER, BATCHED, GROUPED])
def test_in_bf16_factored_adapters_are_as_accurate_as_base_plus_delta(implementation: ExpertsImplementation) -> None:
    truth = results(EAGER, torch.float64, lora=ON_EXPERTS)
    found, dense = (
        results(implementation, torch.bfloat16, lora=ON_EXPERTS, is_factored=each) for each in (True, False)
    )
    assert distances(found, truth)["loss"] < 1e-3
    assert of_all_gradients(found, truth) < 1.1 * of_all_gradients(dense, truth)


def test_layers_without_adapters_keep_the_bits_of_transformers_grouped_product() -> None:
    lora = LoraConfig(targets=[LoraTarget.attention, LoraTarget.experts], layers=[1])
    model = with_adapters(gpt_oss(torch.float32), lora, is_factored=True)
    expert_kernels.use(model, GROUPED, None, Precision.fp32)
    plain = gpt_oss(torch.float32)
    expert_kernels.use(plain, GROUPED, None, Precision.fp32)
    states = [each(input_ids=IDS, output_hidden_states=True).hidden_states[1] for each in (model, plain)]
    assert torch.equal(*states)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_factored_adapters_never_compute_a_tensor_of_the_size_of_a_stack() -> None:
    made: list[int] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            is_new = isinstance(result, Tensor) and not function.is_view
            if is_new and result.shape[-3:] in {each.shape for each in stacks}:
                made.append(result.numel())
            return result

    counts = []
    for is_factored in (False, True):
        model = with_adapters(gpt_oss(torch.float32), ON_EXPERTS, is_factored)
        expert_kernels.use(model, GROUPED, None, Precision.fp32)
        stacks = [parameter for name, parameter in model.named_parameters() if parameter.ndim == 3]
        made.clear()
        with Noting():
            model(input_ids=IDS, labels=IDS).loss.backward()
        counts.append(len(made))
    assert counts[0] > 0 and counts[1] == 0


def test_every_expert_gets_a_gradient_even_without_tokens() -> None:
    for implementation in (EAGER, BATCHED, GROUPED):
        model = with_adapters(gpt_oss(torch.float32, active=1), ON_EXPERTS, is_factored=True)
        expert_kernels.use(model, implementation, None, Precision.fp32)
        model(input_ids=IDS[:1, :2], labels=IDS[:1, :2]).loss.backward()
        gradients = [p.grad for name, p in model.named_parameters() if is_factor(name)]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_factored_adapters_begin_and_are_saved_exactly_as_pefts_own(tmp_path: Path) -> None:
    for is_factored in (False, True):
        model = adapters.attach(gpt_oss(torch.float32), TrainConfig(), "sft", is_factored=is_factored)
        model.save_pretrained(str(tmp_path / str(is_factored)))
        assert adapters.is_factored(model) is is_factored
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "True" / file).read_bytes() == (tmp_path / "False" / file).read_bytes()


def test_a_saved_adapter_computes_the_same_when_peft_loads_it(tmp_path: Path) -> None:
    model = with_adapters(gpt_oss(torch.float64), ON_EXPERTS, is_factored=True)
    expert_kernels.use(model, EAGER, None, Precision.fp32)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(gpt_oss(torch.float64), str(tmp_path))
    expert_kernels.use(loaded, EAGER, None, Precision.fp32)
    torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-12, atol=1e-12)
    merged = model.merge_and_unload()  # computes the delta in float32
    torch.testing.assert_close(merged(input_ids=IDS).logits, loaded(input_ids=IDS).logits, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "precision", "has_kernel"),
    [
        (None, Precision.fp32, True),
        ((8, 0), Precision.bf16, False),
        ((8, 9), Precision.mixed_bf16, False),
        ((9, 0), Precision.bf16, True),
        ((9, 0), Precision.fp32, False),
        ((10, 0), Precision.mixed_bf16, True),
        ((10, 3), Precision.bf16, True),
        ((12, 0), Precision.bf16, False),
    ],
)
def test_auto_is_a_loop_for_factored_adapters_where_torch_has_no_grouped_product(
    capability: Any, precision: Precision, has_kernel: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expert_kernels.has_grouped_mm(capability, precision) is has_kernel
    auto = ExpertsImplementation.auto
    chosen = expert_kernels.choose(auto, None, precision, capability, is_factored=True)
    assert chosen is (GROUPED if has_kernel else EAGER)
    assert capsys.readouterr().err == ""
    assert expert_kernels.choose(auto, MXFP4, precision, capability, is_factored=False) is GROUPED
    warned = capsys.readouterr().err
    assert has_kernel == ("waits for the GPU" not in warned)
    assert expert_kernels.choose(auto, FORMATS["nvfp4_w4a4"], precision, capability, is_factored=False) is EAGER
    assert expert_kernels.choose(BATCHED, None, precision, capability, is_factored=True) is BATCHED


@pytest.mark.parametrize(
    ("multiply", "reads"), [(expert_products.multiply_grouped, False), (expert_products.multiply_in_loop, True)]
)
def test_the_grouped_product_reads_no_value_on_the_host(multiply: Multiply, reads: bool) -> None:
    """Fake tensors have no values, so reading one is an error."""
    config = GptOssConfig(hidden_size=64, intermediate_size=96, num_local_experts=EXPERTS)
    kind = {"dtype": torch.bfloat16}  # torch refuses to trace grouped_mm in FP32
    with FakeTensorMode(), pytest.raises(DataDependentOutputException) if reads else nullcontext():
        experts = nn.Module()
        experts.num_experts, experts._apply_gate = EXPERTS, partial(GptOssExperts._apply_gate, GptOssExperts(config))
        for name, sizes in {"gate_up_proj": (64, 192), "down_proj": (96, 64)}.items():
            setattr(experts, name, torch.randn(EXPERTS, *sizes, **kind))
            setattr(experts, f"{name}_bias", torch.randn(EXPERTS, sizes[1], **kind))
        shapes = {"gate_up_proj": ((64, 8), (8, 192)), "down_proj": ((96, 8), (8, 64))}
        factors = {
            name: Factors(*(torch.randn(EXPERTS, *shape, **kind, requires_grad=True) for shape in both), 2.0)
            for name, both in shapes.items()
        }
        states, shares = torch.randn(8, 64, **kind, requires_grad=True), torch.rand(8, 2, **kind)
        chosen = torch.randint(EXPERTS, (8, 2))
        expert_products.forward(experts, states, chosen, shares, factors, multiply).sum().backward()
        assert states.grad is not None
