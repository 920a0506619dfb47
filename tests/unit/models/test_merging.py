"""Adapters can be merged a few experts at a time.

Merging the whole stack at once gives the same bits. So does training.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from pipeline.checkpoints.gpt_oss import EXPERT_WEIGHTS, plain_tensors
from pipeline.checkpoints.reading import Checkpoint
from pipeline.config import LoraConfig, LoraTarget, TinyConfig, TrainConfig
from pipeline.models import adapters, fake_quantizers, loading, quantizer_calls
from pipeline.models import weights as weights_module
from pipeline.models.merging import Merger
from pipeline.models.references import ModelRef
from pipeline.models.tiny_model import create_tiny
from pipeline.models.weights import Weights
from pipeline.numerics import low_rank
from pipeline.numerics.codec import fake_quantize
from pipeline.numerics.formats import MXFP4

ADAPTED_LAYER = 1
STACKS = [f"model.layers.{ADAPTED_LAYER}.mlp.experts.{name}" for name in EXPERT_WEIGHTS]
ATTENTION = [f"model.layers.{ADAPTED_LAYER}.self_attn.{name}_proj.weight" for name in "qkvo"]
OTHERS = [
    "model.layers.0.mlp.experts.down_proj",
    "model.embed_tokens.weight",
    f"model.layers.{ADAPTED_LAYER}.self_attn.q_proj.bias",
    f"model.layers.{ADAPTED_LAYER}.mlp.experts.down_proj_bias",
]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
RANKS = (1, 2, 8, 33)


@dataclass(frozen=True)
class Adapted:
    """A tiny model with random adapters on one layer, on disk.

    Attributes:
        ref: reference to the adapted model.
        merged: name -> weight of the adapted layer. PEFT's `merge_and_unload` has merged its adapter.
    """

    ref: ModelRef
    merged: dict[str, Tensor]

    def merger(self) -> Merger:
        return Merger(self.ref.directory, AutoConfig.from_pretrained(self.ref.base), self.ref.dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    kind = BITS[one.dtype]
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


def adapt(base: Path, directory: Path, dtype: torch.dtype, rank: int) -> Adapted:
    lora = LoraConfig(rank=rank, alpha=12, targets=[LoraTarget.attention, LoraTarget.experts], layers=[ADAPTED_LAYER])
    model = adapters.attach(loading.load_plain(base, dtype), TrainConfig(lora=lora), "sft")
    torch.manual_seed(rank)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    model.save_pretrained(str(directory))
    ref = ModelRef("sft", directory, base, adapter=True, dtype=dtype)
    plain = dict(model.merge_and_unload().named_parameters())
    return Adapted(ref, {name: plain[name].detach().clone() for name in (*STACKS, *ATTENTION)})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that returns the directory of a tiny model with the given sizes. Each model is made only once."""
    root = tmp_path_factory.mktemp("merging")

    def make(**sizes: int) -> Path:
        directory: Path = root / "-".join(["tiny", *map(str, sizes.values())])
        if not directory.exists():
            create_tiny(directory, TinyConfig(**sizes))
        return directory

    return make


@pytest.fixture(scope="module")
def adapted(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Adapted]:
    """A function that returns an adapted model. Each model is made only once."""
    made: dict[Any, Adapted] = {}

    def make(dtype: torch.dtype, rank: int, **sizes: int) -> Adapted:
        key = (dtype, rank, *sizes.items())
        if key not in made:
            made[key] = adapt(tiny(**sizes), tmp_path_factory.mktemp("adapter"), dtype, rank)
        return made[key]

    return make


def parts_of(count: int) -> list[list[slice]]:
    """Return several ways to split a stack: into single experts, into uneven parts, and not at all."""
    bounds = [[*range(count + 1)], [0, 3, count], [0, 1, count - 1, count], [0, count]]
    return [[slice(*pair) for pair in pairwise(each)] for each in bounds]


def merge_in(parts: list[slice], merger: Merger, name: str, base: Tensor) -> Tensor:
    return torch.cat([merger.merge(name, base[rows], rows.start) for rows in parts])


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_a_few_experts_at_a_time_gives_the_bits_of_the_whole_stack(
    dtype: torch.dtype, rank: int, adapted: Callable[..., Adapted]
) -> None:
    model = adapted(dtype, rank)
    merger, checkpoint = model.merger(), Checkpoint(model.ref.base)
    for name in STACKS:
        base = checkpoint.read_plain(name)
        whole = merger.merge(name, base)
        assert not torch.equal(whole, base.to(dtype))
        for parts in parts_of(len(base)):
            assert same_bits(merge_in(parts, merger, name, base), whole), (name, parts)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_local_experts": 7},
        {"num_local_experts": 9, "hidden_size": 256, "intermediate_size": 320},
        {"num_local_experts": 5, "hidden_size": 544, "intermediate_size": 32},
        {"num_local_experts": 6, "hidden_size": 96, "intermediate_size": 96},
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_a_few_experts_at_a_time_gives_the_same_bits_at_other_sizes(
    dtype: torch.dtype, sizes: dict[str, int], adapted: Callable[..., Adapted]
) -> None:
    model = adapted(dtype, 8, **sizes)
    merger, checkpoint = model.merger(), Checkpoint(model.ref.base)
    for name in STACKS:
        base = checkpoint.read_plain(name)
        whole = merger.merge(name, base)
        for parts in parts_of(len(base)):
            assert same_bits(merge_in(parts, merger, name, base), whole), (name, parts)
        assert same_bits(whole, model.merged[name])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_does_not_matter(threads: int, adapted: Callable[..., Adapted]) -> None:
    model = adapted(torch.float32, 8)
    merger, name = model.merger(), STACKS[0]
    base = Checkpoint(model.ref.base).read_plain(name)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        merged = merge_in([slice(0, 2), slice(2, 8)], merger, name, base)
    finally:
        torch.set_num_threads(before)
    assert same_bits(merged, model.merged[name])


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_merge_equals_pefts_merge_on_the_loaded_model(
    dtype: torch.dtype, rank: int, adapted: Callable[..., Adapted]
) -> None:
    model = adapted(dtype, rank)
    weights = Weights(model.ref)
    for name in (*STACKS, *ATTENTION):
        assert same_bits(weights.read_trained(name), model.merged[name]), name


def test_merging_parts_does_not_change_the_adapters(adapted: Callable[..., Adapted]) -> None:
    model = adapted(torch.float32, 8)
    merger, name = model.merger(), STACKS[1]
    base = Checkpoint(model.ref.base).read_plain(name)
    before = base.clone()
    merger.merge(name, base[6:], 6)
    merger.merge(name, base[1:4], 1)
    assert same_bits(merger.merge(name, base), model.merged[name])
    assert same_bits(base, before)


def test_only_adapted_weights_are_in_the_merger(adapted: Callable[..., Adapted]) -> None:
    model = adapted(torch.float32, 8)
    merger = model.merger()
    layout = plain_tensors(Checkpoint(model.ref.base).shape)
    assert {name for name in layout if name in merger} == {*STACKS, *ATTENTION}


# Bytes that one step may take. They determine the number of rows in a part.
STEP_SIZES = (1, 5_000, 50_000, 100_000, 10**9)


def assert_covered_once(parts: list[slice], rows: int) -> None:
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
    assert all(part.start < part.stop and part.step is None for part in parts)


@pytest.mark.parametrize("step_bytes", STEP_SIZES)
@pytest.mark.parametrize("is_adapted", [True, False])
def test_parts_cover_every_row_of_every_weight_once(
    is_adapted: bool, step_bytes: int, adapted: Callable[..., Adapted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "STEP_BYTES", step_bytes)
    ref = adapted(torch.float32, 8).ref
    weights = Weights(ref if is_adapted else ModelRef("source", ref.base, ref.base))
    for name, info in plain_tensors(weights.shape).items():
        parts = weights.parts(name)
        assert_covered_once(parts, info.shape[0])


def test_parts_of_expert_stacks_have_the_requested_size(
    adapted: Callable[..., Adapted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "STEP_BYTES", 3 * 96 * 64 * 4)
    weights = Weights(adapted(torch.float32, 8).ref)
    for layer in (0, ADAPTED_LAYER):
        down, gate_up = (f"model.layers.{layer}.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj"))
        assert weights.parts(down) == [slice(0, 3), slice(3, 6), slice(6, 8)]
        assert weights.parts(gate_up) == [slice(i, i + 1) for i in range(8)]


@pytest.mark.parametrize("step_bytes", STEP_SIZES)
def test_adapted_attention_is_merged_whole(
    step_bytes: int, adapted: Callable[..., Adapted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "STEP_BYTES", step_bytes)
    weights = Weights(adapted(torch.float32, 8).ref)
    for name in ATTENTION:
        assert weights.parts(name) == [slice(0, plain_tensors(weights.shape)[name].shape[0])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step_bytes", STEP_SIZES)
def test_weights_read_in_parts_equal_whole_weights(
    step_bytes: int, dtype: torch.dtype, adapted: Callable[..., Adapted], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(dtype, 8)
    weights = Weights(model.ref)
    expected = {name: weights.read_trained(name) for name in (*STACKS, *ATTENTION, *OTHERS)}
    monkeypatch.setattr(weights_module, "STEP_BYTES", step_bytes)
    for name, whole in expected.items():
        parts = [weights.read_trained(name, rows, weights.read_stored(name, rows)) for rows in weights.parts(name)]
        assert same_bits(torch.cat(parts), whole), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_under_autocast_rounds_the_weights_that_are_merged_for_the_export(
    dtype: torch.dtype, adapted: Callable[..., Adapted]
) -> None:
    model = adapted(dtype, 8)
    trained = loading.load_quantized(model.ref, dtype)
    fake_quantizers.insert(trained, MXFP4, lambda _: None)
    seen: dict[tuple[str, int], Tensor] = {}
    ids = torch.arange(64).reshape(1, 64)
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        quantizer_calls.watch(trained, lambda name, values, first: seen.update({(name, first): values.clone()})),
    ):
        trained(input_ids=ids)
    weights = Weights(replace(model.ref, block_format=MXFP4))
    for name in STACKS:
        expected = weights.read_effective(name).transpose(1, 2)
        found = torch.cat([seen[name, first] for first in sorted(each for of, each in seen if of == name)])
        assert torch.equal(found.float(), expected.float()), name


def test_the_sum_of_a_matrix_product_differs_in_few_merged_weights_and_hardly_a_rounded_one() -> None:
    """PEFT computes the delta with a matrix product, which may add in another order."""
    experts, rank, width = 2, 8, 288
    generator = torch.Generator().manual_seed(0)
    base = fake_quantize(0.02 * torch.randn(experts, width, width, generator=generator), MXFP4).transpose(1, 2)
    a = 0.6 * width**-0.5 * torch.randn(experts, width, rank, generator=generator)
    b = 0.01 * torch.randn(experts, rank, width, generator=generator)
    base = base.bfloat16()
    merged = [base + (a @ b).bfloat16(), low_rank.merge(base, a, b, 1.0)]
    rounded = [fake_quantize(weights.transpose(1, 2), MXFP4) for weights in merged]
    assert (merged[0] != merged[1]).float().mean() < 1e-4
    assert (rounded[0] != rounded[1]).float().mean() < 1e-4
