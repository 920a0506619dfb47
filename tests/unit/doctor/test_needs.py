"""The computed needs of a run agree with the memory that transformers, PEFT and torch take for a tiny model."""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.checkpoints.gpt_oss import Shape
from pipeline.config import (
    DataConfig,
    DistillationConfig,
    Experts,
    FormatConfig,
    FormatName,
    LoraConfig,
    LoraTarget,
    Method,
    Oscillation,
    Precision,
    QatConfig,
    QuantizeConfig,
    QuantizeSource,
    RoundingMethod,
    RoundingScales,
    ScaleRule,
    Sharding,
    TinyConfig,
    TrainConfig,
)
from pipeline.doctor import needs
from pipeline.doctor.plan import Plan
from pipeline.export import EXPORTERS
from pipeline.export.job import Job
from pipeline.models import adapters, expert_kernels
from pipeline.models.references import ModelRef
from pipeline.models.source import Source
from pipeline.models.tiny_model import create_tiny
from pipeline.models.weights import Weights
from pipeline.numerics.formats import MXFP4

TINY = TinyConfig(num_hidden_layers=3, num_key_value_heads=1)
FULL = TrainConfig(precision=Precision.fp32, attn_implementation="eager")
LORA = TrainConfig(method=Method.lora, precision=Precision.bf16, attn_implementation="eager")
ROUNDED = QuantizeConfig(scales=RoundingScales.ceil)
RELEASED = Shape(24, 2880, 2880, 32, 64, 8, 64, 201_088)
RELEASED_CONFIG = {"model_type": "gpt_oss", "num_experts_per_tok": 4, **vars(RELEASED)}


@pytest.fixture(scope="module")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory: Path = tmp_path_factory.mktemp("needs") / "tiny"
    create_tiny(directory, TINY)
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    return config


@pytest.fixture(scope="module")
def shape(model_config: dict[str, Any]) -> Shape:
    return Shape.of(model_config, "config.json")


def build(model_config: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, GptOssConfig

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        GptOssConfig(**model_config), attn_implementation="eager", experts_implementation="eager"
    )


def plan_of(sft: TrainConfig, qat: TrainConfig, target: str = "mxfp4") -> Plan:
    return Plan("model", DataConfig(), sft, QatConfig(**vars(qat)), Sharding.none, target)


def memory(
    shape: Shape, train: TrainConfig, tokens: int, experts_per_token: int, is_quantized: bool, budget: float = 0
) -> needs.Memory:
    return needs.memory(
        shape,
        train,
        tokens=tokens,
        experts_per_token=experts_per_token,
        is_quantized=is_quantized,
        rounded_budget=budget,
    )


def test_parameters_are_counted_as_in_the_model(model_config: dict[str, Any], shape: Shape) -> None:
    model = build(model_config)
    assert needs.parameters(shape)["all"] == sum(p.numel() for p in model.parameters())
    stacks = [p.numel() for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]
    assert needs.parameters(shape)["experts"] == sum(stacks)


LORAS = {
    "both": LoraConfig(rank=4),
    "attention": LoraConfig(targets=[LoraTarget.attention]),
    "experts": LoraConfig(targets=[LoraTarget.experts]),
    "one layer": LoraConfig(rank=2, layers=[1]),
    "every second layer": LoraConfig(rank=2, every_nth=2),
}


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_adapters_have_as_many_parameters_as_in_peft(
    model_config: dict[str, Any], shape: Shape, lora: LoraConfig
) -> None:
    train = replace(LORA, lora=lora)
    adapted = adapters.attach(build(model_config), train, "sft")
    assert sorted(needs.trained_tensors(shape, train)) == sorted(
        p.numel() for p in adapted.parameters() if p.requires_grad
    )


def test_packed_rows_are_laid_end_to_end(model_config: dict[str, Any], shape: Shape) -> None:
    packed = plan_of(replace(FULL, batch_size=2, packing=True), TrainConfig())
    packed.data.max_length = 64
    found = needs.figures(packed, model_config, 32, {})["device_bytes"]["sft"]["activations"]
    assert found == memory(shape, FULL, 128, TINY.num_experts_per_tok, False).activations


def test_gradients_and_optimizer_take_the_bytes_that_torch_allocates(
    model_config: dict[str, Any], shape: Shape
) -> None:
    model = build(model_config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    found = memory(shape, FULL, 8, TINY.num_experts_per_tok, False)
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters())
    states = [value.nbytes for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert found.optimizer == sum(states)


def test_full_fine_tuning_of_20b_takes_sixteen_bytes_a_parameter() -> None:
    found = memory(RELEASED, replace(FULL, precision=Precision.mixed_bf16), 4096, 4, False)
    assert found.weights + found.gradients + found.optimizer == 16 * needs.parameters(RELEASED)["all"]
    assert found.weights + found.gradients + found.optimizer == pytest.approx(334e9, rel=0.01)


@contextmanager
def kept_bytes() -> Iterator[dict[int, int]]:
    """Yield a dictionary: storage -> bytes, for all tensors that torch keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize(("batch_size", "tokens"), [(1, 64), (2, 256), (4, 128)])
def test_activations_are_close_to_the_tensors_that_autograd_keeps(
    model_config: dict[str, Any], shape: Shape, batch_size: int, tokens: int, method: Method
) -> None:
    train = replace(FULL, method=method, batch_size=batch_size, gradient_checkpointing=False)
    model = build(model_config)
    if method is Method.lora:
        model = adapters.attach(model, train, "sft", is_factored=True)
        expert_kernels.use(model, train.experts_implementation, None, train.precision)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ids = torch.randint(0, 700, (batch_size, tokens))
    with kept_bytes() as kept:
        loss = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False).loss
    held = sum(size for storage, size in kept.items() if storage not in parameters)
    assert loss.requires_grad
    estimate = memory(shape, train, tokens, TINY.num_experts_per_tok, False).activations
    assert 0.8 < estimate / held < 1.8


def test_checkpointing_and_flex_attention_lower_activations_and_longer_batches_raise_them() -> None:
    def activations(**changes: Any) -> int:
        train = replace(LORA, **{"batch_size": 2, **changes})
        return memory(RELEASED, train, 2048, 4, False).activations

    usual = activations()
    assert activations(gradient_checkpointing=False) > 5 * usual
    assert activations(batch_size=1) < usual < activations(batch_size=4)
    assert activations(attn_implementation="flex_attention") < usual


def test_disk_space_follows_from_the_shapes() -> None:
    found = needs.disk(plan_of(FULL, FULL), RELEASED, True)
    every = needs.parameters(RELEASED)["all"]
    assert (found["upcast"], found["sft"], found["qat"]) == (2 * every, 4 * every, 4 * every)
    assert found["quantize"] == 0
    assert found["export"] == pytest.approx(13.76e9, rel=0.001)  # the size of openai/gpt-oss-20b


def exported_to(target: str) -> Plan:
    return plan_of(FULL, FULL, target)


@pytest.mark.parametrize("target", EXPORTERS)
def test_an_export_takes_the_bytes_that_its_target_writes(target: str, tmp_path: Path) -> None:
    tiny, directory = tmp_path / "tiny", tmp_path / "export"
    create_tiny(tiny, TINY)
    directory.mkdir()
    job = Job(Weights(ModelRef("tiny", tiny, tiny)), Source(tiny, ""), MXFP4, 1 << 30, "cpu")
    EXPORTERS[target].write(job, directory)
    found = needs.disk(plan_of(FULL, FULL, target), job.weights.shape, True)["export"]
    assert found == pytest.approx(tensor_bytes(directory), rel=0.01)


def tensor_bytes(export: Path) -> int:
    """Return the size of the tensors in the files, without headers. The formats' own libraries read the files."""
    if files := list(export.glob("*.gguf")):
        return sum(
            int(each.n_bytes) for path in files for each in importlib.import_module("gguf").GGUFReader(path).tensors
        )
    return sum(each.nbytes for path in export.glob("*.safetensors") for each in load_file(path).values())


def test_experts_take_four_times_the_bytes_in_bf16() -> None:
    mxfp4, nvfp4, bf16 = (
        needs.disk(plan_of(FULL, FULL, target), RELEASED, True)["export"] for target in ("mxfp4", "nvfp4", "bf16")
    )
    experts = needs.parameters(RELEASED)["experts"]
    others = 2 * (needs.parameters(RELEASED)["all"] - experts)
    assert (bf16 - others) / (mxfp4 - others) == 16 / 4.25
    assert (nvfp4 - others) / (mxfp4 - others) == 4.5 / 4.25


@pytest.mark.parametrize(
    ("sft", "qat", "expected"),
    [(FULL, FULL, "nothing"), (LORA, LORA, "nothing"), (LORA, FULL, "a merged model"), (FULL, LORA, "adapters")],
)
def test_quantize_writes_only_weights_that_it_cannot_link(sft: TrainConfig, qat: TrainConfig, expected: str) -> None:
    merged = 2 * needs.parameters(RELEASED)["all"]
    sizes = {"nothing": 0, "a merged model": merged, "adapters": 4 * needs.trained_parameters(RELEASED, qat)}
    assert needs.disk(plan_of(sft, qat), RELEASED, True)["quantize"] == sizes[expected]


@pytest.mark.parametrize(
    ("qat", "name", "is_packed"), [(FULL, "mxfp4", False), (LORA, "mxfp4", True), (LORA, "nvfp4", False)]
)
def test_rounded_experts_take_the_space_of_a_plain_or_packed_model(
    qat: TrainConfig, name: str, is_packed: bool
) -> None:
    plan = replace(plan_of(LORA, qat), quantize=ROUNDED, format=FormatConfig(FormatName[name]))
    model = {**RELEASED_CONFIG, "quantization_config": {"quant_method": "mxfp4"}}
    assert plan.is_packed("qat", model) == is_packed and plan.is_packed("sft", model)
    adapters = 4 * needs.trained_parameters(RELEASED, qat) if qat is LORA else 0
    base = needs.disk(plan, RELEASED, True)["quantize"] - adapters
    assert base == pytest.approx(13.76e9 if is_packed else 2 * needs.parameters(RELEASED)["all"], rel=0.001)


def test_gptq_keeps_its_rounded_layers_and_states_until_the_stage_is_complete() -> None:
    plan, model = plan_of(FULL, FULL), {**RELEASED_CONFIG, "num_experts_per_tok": 4}
    assert "quantize" not in needs.figures(plan, model, 4096, {})["checkpoint_bytes"]
    codes = needs.parameters(RELEASED)["experts"] * 4.25 / 8
    for samples, tokens in ((None, 2 * 8 * 2880 * 32 / 4), (10, 10 * 4096)):
        asked = QuantizeConfig(method=RoundingMethod.gptq, calibration_samples=samples)
        found = needs.figures(replace(plan, quantize=asked), model, 4096, {})["checkpoint_bytes"]["quantize"]
        assert found == codes + 2 * tokens * 2880 * 4  # full training keeps its weights in float32
    assert found < needs.figures(plan, model, 4096, {})["checkpoint_bytes"]["qat"]


@pytest.mark.parametrize("sft", [FULL, LORA], ids=["full", "lora"])
def test_the_bf16_parts_are_trained_on_plain_experts_if_importance_chooses_the_scales(sft: TrainConfig) -> None:
    """Rounding by importance needs a calibrated model, so `quantize` cannot pack the experts."""
    mse = FormatConfig(scale_rule=ScaleRule["mse"])
    packed = replace(plan_of(sft, replace(FULL, method=Method.bf16_parts)), format=mse)
    plain = replace(packed, format=replace(mse, importance=True))
    model = {**RELEASED_CONFIG, "quantization_config": {"quant_method": "mxfp4"}}
    assert packed.is_packed("qat", model) and not plain.is_packed("qat", model)
    weights = [needs.of_stage(plan, "qat", model, 4096).weights for plan in (packed, plain)]
    experts = needs.parameters(RELEASED)["experts"]
    assert weights[1] - weights[0] >= experts * 4 - experts * 4.25 / 8 - 1
    quantized = [needs.disk(plan, RELEASED, True)["quantize"] for plan in (packed, plain)]
    merged = 0 if sft is FULL else 2 * needs.parameters(RELEASED)["all"]
    assert quantized == [pytest.approx(13.76e9, rel=0.001), merged]


def test_a_teacher_of_the_bf16_parts_is_a_second_model() -> None:
    qat = replace(
        QatConfig(**vars(replace(LORA, method=Method.bf16_parts))), distillation=DistillationConfig(weight=0.5)
    )
    model = {**RELEASED_CONFIG, "quantization_config": {"quant_method": "mxfp4"}}
    found = needs.of_stage(replace(plan_of(FULL, LORA), qat=qat), "qat", model, 4096)
    assert found.teacher == 2 * needs.parameters(RELEASED)["all"]


def test_a_teacher_is_a_second_model_if_quantize_wrote_a_rounded_base() -> None:
    qat = replace(QatConfig(**vars(LORA)), distillation=DistillationConfig(weight=0.5))
    plan = replace(plan_of(LORA, LORA), qat=qat)
    model = {**RELEASED_CONFIG, "quantization_config": {"quant_method": "mxfp4"}}
    shared, own = (
        needs.of_stage(replace(plan, quantize=each), "qat", model, 4096).teacher for each in (QuantizeConfig(), ROUNDED)
    )
    assert (shared, own) == (0, 2 * needs.parameters(RELEASED)["all"])


def test_a_bf16_source_is_linked_or_packed() -> None:
    plan = plan_of(LORA, LORA)
    assert needs.disk(plan, RELEASED, False)["upcast"] == 0
    packed = needs.disk(replace(plan, experts=Experts.packed), RELEASED, False)
    assert packed["upcast"] == pytest.approx(13.76e9, rel=0.001)


@pytest.mark.parametrize("is_mxfp4", [True, False])
@pytest.mark.parametrize("experts", [None, *Experts])
def test_experts_are_packed_in_training_if_they_are_after_upcast(experts: Experts | None, is_mxfp4: bool) -> None:
    plan = replace(plan_of(LORA, LORA), experts=experts)
    model = {**RELEASED_CONFIG, **({"quantization_config": {"quant_method": "mxfp4"}} if is_mxfp4 else {})}
    is_packed = plan.is_packed("sft", model)
    assert is_packed == (experts is Experts.packed or (experts is None and is_mxfp4))
    assert (needs.disk(plan, RELEASED, is_mxfp4)["upcast"] == 0) == (is_packed == is_mxfp4)


def test_without_sft_the_method_of_qat_decides_about_upcast_and_quantize() -> None:
    model = {**RELEASED_CONFIG, "quantization_config": {"quant_method": "mxfp4"}}
    adapted, whole = (
        replace(plan_of(*trains), quantize=QuantizeConfig(QuantizeSource.upcast))
        for trains in ((FULL, LORA), (LORA, FULL))
    )
    assert adapted.is_packed("qat", model) and not whole.is_packed("qat", model)
    found = needs.disk(adapted, RELEASED, True)
    assert (found["upcast"], found["sft"]) == (0, 0)
    assert found["quantize"] == found["qat"] == 4 * needs.trained_parameters(RELEASED, LORA)
    found = needs.disk(whole, RELEASED, True)
    assert (found["upcast"], found["quantize"]) == (2 * needs.parameters(RELEASED)["all"], 0)


def test_checkpoints_take_one_more_than_the_limit() -> None:
    trained = needs.trained_parameters(RELEASED, LORA)
    assert needs.checkpoints(RELEASED, LORA) == (LORA.save_total_limit + 1) * trained * (4 + 8)


@pytest.mark.parametrize(
    ("optimizer", "each"),
    [("adamw_torch_fused", 2), ("adamw_bnb_8bit", 1), ("sgd", 0)],
)
def test_optimizer_states_of_a_bf16_weight_have_the_optimizers_type(optimizer: str, each: float) -> None:
    found = memory(RELEASED, replace(FULL, precision=Precision.bf16, optimizer=optimizer), 8, 4, False)
    assert found.optimizer == int(2 * each * needs.parameters(RELEASED)["all"])


@pytest.mark.parametrize(("optimizer", "each"), [("adamw_torch_8bit", 1), ("adamw_torch_4bit", 0.5)])
def test_codes_of_optimizer_states_have_a_scale_for_256_values(optimizer: str, each: float) -> None:
    whole = memory(RELEASED, replace(FULL, precision=Precision.bf16, optimizer=optimizer), 8, 4, False)
    assert whole.optimizer == pytest.approx(2 * (each + 4 / 256) * needs.parameters(RELEASED)["all"], rel=1e-3)
    adapters = replace(LORA, optimizer=optimizer)
    trained = needs.trained_parameters(RELEASED, adapters)
    assert memory(RELEASED, adapters, 8, 4, False).optimizer == pytest.approx(2 * (each + 4 / 256) * trained, rel=0.01)


def test_holding_weights_takes_three_bytes_for_each_expert_weight_in_memory_and_in_checkpoints() -> None:
    held, free = (QatConfig(oscillation=each) for each in (Oscillation.hold, Oscillation.none))
    state = 3 * needs.parameters(RELEASED)["experts"]
    with_state, without = (memory(RELEASED, each, 8, 4, True) for each in (held, free))
    assert with_state == replace(without, optimizer=without.optimizer + state)
    grown = needs.checkpoints(RELEASED, held) - needs.checkpoints(RELEASED, free)
    assert grown == (held.save_total_limit + 1) * state


@pytest.mark.parametrize("train", [FULL, LORA])
def test_checkpoints_hold_the_optimizers_states(train: TrainConfig) -> None:
    plain, codes = (needs.checkpoints(RELEASED, replace(train, optimizer=each)) for each in ("sgd", "adamw_torch_8bit"))
    states = memory(RELEASED, replace(train, optimizer="adamw_torch_8bit"), 8, 4, False).optimizer
    assert codes - plain == (train.save_total_limit + 1) * states


@pytest.mark.parametrize(
    ("sharding", "budget_gib", "expected"),
    [
        (Sharding.none, None, 0),
        (Sharding.none, 1000, 38.2e9),
        (Sharding.fsdp2, None, 0),
        (Sharding.none, 0, 0),
        (Sharding.fsdp2, 1, 2**30),
    ],
)
def test_rounded_experts_are_kept_in_bf16_up_to_their_budget(
    sharding: Sharding, budget_gib: float | None, expected: float
) -> None:
    planned = replace(plan_of(FULL, QatConfig(rounded_cache_gib=budget_gib)), sharding=sharding)
    found = needs.figures(planned, RELEASED_CONFIG, 8, {})["device_bytes"]["qat"]["rounded"]
    assert found == pytest.approx(expected, rel=1e-3)


def test_only_adapted_experts_are_rounded_in_every_step() -> None:
    def rounded(**lora: Any) -> int:
        return memory(RELEASED, replace(LORA, lora=LoraConfig(**lora)), 8, 4, True, float("inf")).rounded

    assert rounded(targets=[LoraTarget.attention]) == 0
    assert 12 * rounded(layers=[3, 7]) == rounded()
