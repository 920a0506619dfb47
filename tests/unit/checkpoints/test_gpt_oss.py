"""The layout tables agree with the model that transformers builds, and with the released checkpoints."""

import json
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoints.gpt_oss import (
    ATTENTION_PROJECTIONS,
    ATTENTION_TYPES,
    DECODER_LAYER_CLASS,
    EMBEDDING,
    EXPERT_BIASES,
    EXPERT_PATTERN,
    EXPERT_WEIGHTS,
    FINAL_NORM,
    HEAD,
    MODELING_MODULE,
    Shape,
    TensorInfo,
    attention_projection,
    expert_parameter,
    expert_projections,
    is_packed_name,
    other_tensors,
    packed_tensors,
    plain_tensors,
)
from pipeline.config import TinyConfig
from pipeline.errors import UserError
from pipeline.models.tiny_model import create_tiny

TINY = TinyConfig(num_hidden_layers=3, num_key_value_heads=1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory: Path = tmp_path_factory.mktemp("layout") / "tiny"
    create_tiny(directory, TINY)
    return json.loads((directory / "config.json").read_text())


@pytest.fixture(scope="module")
def shape(config: dict[str, Any]) -> Shape:
    return Shape.of(config, "config.json")


@pytest.fixture(scope="module")
def parameters(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter in transformers' model."""
    from transformers import GptOssConfig, GptOssForCausalLM

    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(**config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.fixture
def released() -> dict[str, Shape]:
    common = {
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 201_088,
    }
    return {
        "20b": Shape(num_hidden_layers=24, num_local_experts=32, **common),
        "120b": Shape(num_hidden_layers=36, num_local_experts=128, **common),
    }


def shapes_of(tensors: dict[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in tensors.items()}


def test_all_sizes_of_the_tiny_model_differ(shape: Shape) -> None:
    """The tests below need different sizes, because with equal sizes a transposed tensor would have the right shape."""
    widths = (
        shape.hidden_size,
        shape.intermediate_size,
        2 * shape.intermediate_size,
        shape.num_attention_heads * shape.head_dim,
        shape.num_key_value_heads * shape.head_dim,
        shape.num_attention_heads,
        shape.num_local_experts,
        shape.vocab_size,
    )
    assert len(set(widths)) == len(widths)


def test_the_plain_layout_is_the_same_as_in_transformers(shape: Shape, parameters: dict[str, tuple[int, ...]]) -> None:
    assert shapes_of(plain_tensors(shape)) == parameters


def test_the_packed_layout_is_the_same_as_in_transformers_except_for_expert_weights(
    shape: Shape, parameters: dict[str, tuple[int, ...]]
) -> None:
    experts = {projection.name for projection in expert_projections(shape)}
    packed = {name for projection in expert_projections(shape) for name in projection.packed_tensors()}
    layout = shapes_of(packed_tensors(shape))
    assert {name: size for name, size in layout.items() if name not in packed} == {
        name: size for name, size in parameters.items() if name not in experts
    }
    assert packed <= layout.keys()
    assert not experts & layout.keys()


def test_transformers_decodes_packed_shapes_to_plain_shapes(
    shape: Shape, parameters: dict[str, tuple[int, ...]]
) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    for projection in expert_projections(shape):
        blocks, scales = (torch.zeros(i.shape, dtype=torch.uint8) for i in projection.packed_tensors().values())
        assert tuple(convert_moe_packed_tensors(blocks, scales).shape) == parameters[projection.name]


def test_expert_projections_are_every_stack_of_expert_weights_in_layer_order(
    shape: Shape, parameters: dict[str, tuple[int, ...]]
) -> None:
    found = [(p.layer, p.name, (p.experts, p.in_features, p.out_features)) for p in expert_projections(shape)]
    stacks = [name for name, size in parameters.items() if len(size) == 3]
    assert sorted(name for _, name, _ in found) == sorted(stacks)
    assert found == [
        (layer, name, parameters[name])
        for layer in range(TINY.num_hidden_layers)
        for name in (f"model.layers.{layer}.mlp.experts.{kind}_proj" for kind in ("gate_up", "down"))
    ]


def test_packed_tensors_have_the_names_types_and_shapes_of_the_released_checkpoints(released: dict[str, Shape]) -> None:
    gate_up, down = expert_projections(released["20b"])[-2:]
    prefix = "model.layers.23.mlp.experts."
    assert gate_up.packed_tensors() == {
        f"{prefix}gate_up_proj_blocks": TensorInfo("U8", (32, 5760, 90, 16)),
        f"{prefix}gate_up_proj_scales": TensorInfo("U8", (32, 5760, 90)),
    }
    assert down.packed_tensors() == {
        f"{prefix}down_proj_blocks": TensorInfo("U8", (32, 2880, 90, 16)),
        f"{prefix}down_proj_scales": TensorInfo("U8", (32, 2880, 90)),
    }


def test_a_packed_checkpoint_has_19_tensors_a_layer_and_3_more(shape: Shape) -> None:
    names = list(packed_tensors(shape))
    per_layer = [sum(name.startswith(f"model.layers.{layer}.") for name in names) for layer in range(3)]
    assert per_layer == [19, 19, 19]
    assert {name for name in names if not name.startswith("model.layers.")} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    assert len(names) == 3 * 19 + 3


def test_a_plain_checkpoint_has_17_tensors_a_layer_and_3_more(shape: Shape) -> None:
    assert len(plain_tensors(shape)) == 3 * 17 + 3


@pytest.mark.parametrize(
    ("model", "tensors", "total_size"), [("20b", 459, 13_761_264_768), ("120b", 687, 65_248_815_744)]
)
def test_released_models_have_the_count_and_total_size_of_their_index(
    model: str, tensors: int, total_size: int, released: dict[str, Shape]
) -> None:
    """Compare with `metadata.total_size` in model.safetensors.index.json of openai/gpt-oss-20b and -120b."""
    layout = packed_tensors(released[model])
    assert (len(layout), sum(info.bytes for info in layout.values())) == (tensors, total_size)


def test_only_expert_weights_are_stored_as_bytes(shape: Shape) -> None:
    packed = {name for projection in expert_projections(shape) for name in projection.packed_tensors()}
    assert {name for name, info in packed_tensors(shape).items() if info.dtype == "U8"} == packed
    assert {info.dtype for name, info in packed_tensors(shape).items() if name not in packed} == {"BF16"}


def test_a_plain_layout_has_the_requested_type(shape: Shape) -> None:
    assert {info.dtype for info in plain_tensors(shape).values()} == {"BF16"}
    assert {info.dtype for info in plain_tensors(shape, "F32").values()} == {"F32"}


def test_the_layouts_share_every_tensor_that_is_not_an_expert_weight(shape: Shape) -> None:
    shared = packed_tensors(shape).keys() & plain_tensors(shape).keys()
    assert shared == other_tensors(shape).keys()


def test_names_are_the_parameter_names_of_transformers(parameters: dict[str, tuple[int, ...]]) -> None:
    assert {EMBEDDING, FINAL_NORM, HEAD} <= parameters.keys()
    for layer in range(TINY.num_hidden_layers):
        modules = {attention_projection(layer, name) for name in ATTENTION_PROJECTIONS}
        assert {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")} <= parameters.keys()
        weights = {expert_parameter(layer, name) for name in EXPERT_WEIGHTS}
        biases = {expert_parameter(layer, name) for name in EXPERT_BIASES}
        assert {name for name in parameters if f"layers.{layer}.mlp.experts" in name} == weights | biases


def test_the_pattern_of_experts_matches_only_stacks_of_weights(parameters: dict[str, tuple[int, ...]]) -> None:
    matched = {name for name in parameters if fnmatch(name, EXPERT_PATTERN)}
    assert matched == {name for name, size in parameters.items() if len(size) == 3}


def test_blocks_and_scales_are_recognized_by_their_names(shape: Shape) -> None:
    packed = {name for projection in expert_projections(shape) for name in projection.packed_tensors()}
    assert {name for name in packed_tensors(shape) if is_packed_name(name)} == packed
    assert not any(is_packed_name(name) for name in plain_tensors(shape))


def test_transformers_has_the_class_of_decoder_layers() -> None:
    assert hasattr(import_module(MODELING_MODULE), DECODER_LAYER_CLASS)


def test_the_kinds_of_layers_are_the_same_as_in_transformers(config: dict[str, Any]) -> None:
    from transformers import GptOssConfig

    assert GptOssConfig(num_hidden_layers=4).layer_types == [*ATTENTION_TYPES, *ATTENTION_TYPES]
    assert config["layer_types"] == [ATTENTION_TYPES[0], ATTENTION_TYPES[1], ATTENTION_TYPES[0]]


def test_the_error_names_another_architecture(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"here/config\.json: model_type is 'llama', not 'gpt_oss'"):
        Shape.of({**config, "model_type": "llama"}, "here/config.json")
    with pytest.raises(UserError, match="model_type is None"):
        Shape.of({}, "here/config.json")


@pytest.mark.parametrize("size", [0, -1, "64", 64.0, None, [64]])
def test_the_error_names_a_size_that_is_not_a_positive_whole_number(size: object, config: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        Shape.of({**config, "hidden_size": size}, "here/config.json")
    assert "here/config.json" in str(caught.value)
    assert f"hidden_size={size!r}" in str(caught.value)
    assert "intermediate_size" not in str(caught.value)


def test_several_bad_sizes_are_reported_together(config: dict[str, Any]) -> None:
    without = {key: value for key, value in config.items() if key not in ("head_dim", "vocab_size")}
    with pytest.raises(UserError, match=r"head_dim=None, vocab_size=None"):
        Shape.of(without, "here/config.json")
