"""Reading each layout: the stored tensors and their decoders, compared with code from other projects."""

import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pipeline.checkpoints.gpt_oss import Shape, TensorInfo, expert_projections, plain_tensors
from pipeline.export import EXPORTERS
from pipeline.export.gguf import repack
from pipeline.export.layout import View, packed_layout, stored_tensors
from pipeline.numerics.convert import mxfp4_to_nvfp4
from pipeline.verify.distance import compare

SHAPE = Shape(
    num_hidden_layers=1,
    hidden_size=64,
    intermediate_size=32,
    num_local_experts=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=40,
)
GATE_UP, DOWN = (projection.name for projection in expert_projections(SHAPE))
Tensors = dict[str, Tensor]


class InMemory:
    """A checkpoint in memory."""

    def __init__(self, stored: Tensors, tensors: dict[str, TensorInfo]) -> None:
        self.stored, self.tensors = stored, tensors

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        return self.stored[name][rows]


class InMemoryGguf(InMemory):
    """A GGUF file in memory. `read` returns bytes, so the last dimension of its result runs over the bytes of a row."""

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        part = self.stored[name][rows].contiguous()
        return part.view(torch.uint8).reshape(*part.shape[:-1], -1)


@pytest.fixture
def released() -> Tensors:
    """Tensors with every 4-bit code, including zeros of both signs, and scales that NVFP4 can represent."""
    generator = torch.Generator().manual_seed(0)

    def of(info: TensorInfo) -> Tensor:
        if info.dtype == "BF16":
            return torch.randn(info.shape, generator=generator).bfloat16()
        low, high = (0, 256) if len(info.shape) == 4 else (118, 125)
        return torch.randint(low, high, info.shape, generator=generator, dtype=torch.uint8)

    return {name: of(info) for name, info in stored_tensors(packed_layout(SHAPE)).items()}


def in_mxfp4(released: Tensors) -> Tensors:
    return released


def in_openai(released: Tensors) -> Tensors:
    made: Tensors = {}
    for name, held in EXPORTERS["openai"].layout(SHAPE).items():
        of_name = (name,) if name in released else (f"{name}_blocks", f"{name}_scales")
        for stored, source in zip(held.tensors, of_name, strict=True):
            made.setdefault(stored, torch.empty(0, dtype=released[source].dtype))
            made[stored] = torch.cat((made[stored].reshape(-1, *released[source].shape[1:]), released[source]))
    return made


def in_gguf(released: Tensors) -> Tensors:
    made: Tensors = {}
    for name, held in EXPORTERS["gguf"].layout(SHAPE).items():
        for i, (stored, info) in enumerate(held.tensors.items()):
            part = slice(i, None, len(held.tensors))
            if name in released:
                wide = torch.float32 if info.dtype == "F32" else torch.bfloat16
                made[stored] = released[name][..., part].to(wide)
            else:
                made[stored] = repack(released[f"{name}_blocks"][:, part], released[f"{name}_scales"][:, part])
    return made


def in_nvfp4(released: Tensors) -> Tensors:
    made = {name: tensor for name, tensor in released.items() if not name.endswith(("_blocks", "_scales"))}
    for name in (GATE_UP, DOWN):
        converted = mxfp4_to_nvfp4(released[f"{name}_blocks"], released[f"{name}_scales"])
        assert converted.changed_blocks == 0
        parts = (converted.blocks.flatten(-2).transpose(1, 2), converted.scales.transpose(1, 2), converted.tensor_scale)
        made |= dict(zip(EXPORTERS["nvfp4"].layout(SHAPE)[name].tensors, parts, strict=True))
    return made


def in_bf16(released: Tensors) -> Tensors:
    made = {name: tensor for name, tensor in released.items() if not name.endswith(("_blocks", "_scales"))}
    return made | {name: decode_released(released, name).transpose(1, 2).bfloat16() for name in (GATE_UP, DOWN)}


MAKE = {"mxfp4": in_mxfp4, "openai": in_openai, "gguf": in_gguf, "nvfp4": in_nvfp4, "bf16": in_bf16}


def decode_released(released: Tensors, name: str) -> Tensor:
    """Decode with transformers to (E, out, in)."""
    blocks, scales = released[f"{name}_blocks"], released[f"{name}_scales"]
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)


def view(target: str, released: Tensors) -> View:
    layout = EXPORTERS[target].layout(SHAPE)
    kind = InMemoryGguf if target == "gguf" else InMemory
    return View(kind(MAKE[target](released), stored_tensors(layout)), layout, SHAPE)


def bits(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous().view(torch.int32)


def test_every_target_is_read_back_here() -> None:
    assert MAKE.keys() == EXPORTERS.keys()


@pytest.mark.parametrize("target", MAKE)
def test_a_layout_holds_every_tensor_of_the_plain_layout(target: str) -> None:
    assert EXPORTERS[target].layout(SHAPE).keys() == plain_tensors(SHAPE).keys()


@pytest.mark.parametrize("target", MAKE)
def test_values_equal_those_of_the_released_layout_including_signs_of_zeros(target: str, released: Tensors) -> None:
    export = view(target, released)
    for name in plain_tensors(SHAPE):
        want = released[name] if name in released else decode_released(released, name)
        assert torch.equal(bits(export.values(name)), bits(want)), name


def test_decoding_in_steps_equals_decoding_at_once(released: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.export.layout._DECODED_ROWS", 24)  # of 64
    export = view("mxfp4", released)
    for name in (GATE_UP, DOWN):
        assert torch.equal(bits(export.values(name)), bits(decode_released(released, name)))


@pytest.mark.parametrize("target", MAKE)
def test_the_fast_decoder_gives_the_same_values(target: str, released: Tensors) -> None:
    export = view(target, released)
    for name in (GATE_UP, DOWN):
        assert torch.equal(bits(export.weights(name).transpose(1, 2)), bits(export.values(name)))


@pytest.mark.parametrize("target", MAKE)
def test_rows_are_rows_of_the_whole(target: str, released: Tensors) -> None:
    export = view(target, released)
    for name in plain_tensors(SHAPE):
        assert torch.equal(bits(export.values(name, slice(1, 3))), bits(export.values(name)[1:3])), name


@pytest.mark.parametrize("target", MAKE)
def test_a_repacked_base_model_has_no_distance_from_the_base_model(target: str, released: Tensors) -> None:
    found = compare(view(target, released), view("mxfp4", released))
    assert found.distance.problems == []
    assert found.distance.measured["largest_relative_distance"] == 0
    assert found.same == plain_tensors(SHAPE).keys()


@pytest.mark.parametrize("target", ["mxfp4", "openai", "gguf"])
def test_a_scale_that_is_nan_is_not_finite_even_over_zeros(target: str, released: Tensors) -> None:
    base = view("mxfp4", {name: tensor.clone() for name, tensor in released.items()})
    released[f"{DOWN}_blocks"][1, 2, 0] = 0
    released[f"{DOWN}_scales"][1, 2, 0] = 255
    (problem,) = compare(view(target, released), base).distance.problems
    assert f"{DOWN}: NaN or Inf" in problem and "in 1 of 192 rows" in problem


def test_equal_values_with_other_scales_are_not_the_base_model_s_bytes(released: Tensors) -> None:
    base = view("mxfp4", {name: tensor.clone() for name, tensor in released.items()})
    released[f"{DOWN}_blocks"][0, 0, 0] = 0x22  # two codes of 1.0 under half the scale, instead of two codes of 0.5
    base.files.stored[f"{DOWN}_blocks"][0, 0, 0] = 0x11  # type: ignore[attr-defined]
    released[f"{DOWN}_scales"][0, 0, 0] -= 1
    found = compare(view("mxfp4", released), base)
    assert found.distance.measured["largest_relative_distance"] == 0
    assert DOWN not in found.same and GATE_UP in found.same
