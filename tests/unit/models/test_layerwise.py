"""A model that runs layer by layer has the hidden states, the routing and the inputs of transformers' own forward."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssExperts

from pipeline.checkpoints.gpt_oss import DOWN, GATE_UP, expert_parameter
from pipeline.config import TinyConfig
from pipeline.models import loading, losses, saving, streaming
from pipeline.models.attention import EAGER, FUSED_SINKS
from pipeline.models.layerwise import Walk
from pipeline.models.references import ModelRef
from pipeline.models.tiny_model import create_tiny
from pipeline.models.weights import Weights

LENGTHS = (150, 40, 90)  # longer and shorter than the window of the sliding layers, 64
EXPERTS = TinyConfig().num_local_experts


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("walk") / "tiny"
    create_tiny(directory, TinyConfig(num_hidden_layers=3))
    return directory


@pytest.fixture(scope="module")
def plain(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    saving.write_plain(ModelRef("x", packed, packed), directory)
    return directory


def batches(batch_size: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(500, (length,), generator=generator).tolist() for length in LENGTHS]
    return losses.batches([{"input_ids": each, "labels": each} for each in ids], batch_size, 0)


@contextmanager
def recorded(model: Any) -> Iterator[dict[str, list[tuple[Tensor, ...]]]]:
    """Record the outputs of layers and the arguments of experts: one entry per call, in the order of the calls."""
    found: dict[str, list[tuple[Tensor, ...]]] = {"layer": [], "experts": []}
    hooks = []
    for module in model.modules():
        if isinstance(module, GptOssDecoderLayer):
            hooks.append(module.register_forward_hook(lambda *call: found["layer"].append((call[-1],))))
        if isinstance(module, GptOssExperts):
            hooks.append(module.register_forward_pre_hook(lambda _, call: found["experts"].append(call)))
    yield found
    for hook in hooks:
        hook.remove()


def outputs(walk: Walk, number: int, states: Tensor) -> tuple[Any, Tensor]:
    """Run a layer with the weights on disk. Return what its experts got, and the states after it."""
    with walk.layer(number) as layer:
        routed = layer.attend(states)
        weights = {name: walk.weights.read_trained(expert_parameter(number, name)) for name in (GATE_UP, DOWN)}
        made = torch.zeros_like(states)
        for expert in range(EXPERTS):
            for tokens, shares in routed.parts(expert):
                gated = layer.gate_up(expert, routed.inputs[tokens], weights[GATE_UP][expert])
                made.index_add_(0, tokens, layer.down(expert, gated, weights[DOWN][expert]) * shares.unsqueeze(-1))
        return routed, routed.residual + made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["packed", "plain"])
def test_states_and_routing_have_the_bits_of_transformers(
    form: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(form)
    model = loading.load_plain(base, dtype, experts_implementation="eager")
    walk = Walk(Weights(ModelRef("x", base, base, dtype=dtype)), batches(1)[:1], "cpu", "eager")
    inputs = {name: batches(1)[0][name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), recorded(model) as expected:
        model(**inputs, use_cache=False)
        states = walk.embed()
        for number in range(walk.layers):
            routed, states = outputs(walk, number, states)
            hidden, chosen, _ = expected["experts"][number]
            assert torch.equal(routed.inputs, hidden)
            for expert in range(EXPERTS):
                assert torch.equal(routed.tokens[expert], (chosen == expert).any(dim=1).nonzero().squeeze(1))
            assert torch.equal(states, expected["layer"][number][0][0])


@pytest.mark.parametrize("batch_size", [2, 3])
def test_padding_is_no_token_and_changes_no_state(batch_size: int, packed: Path) -> None:
    found = []
    for size in (1, batch_size):
        walk = Walk(Weights(ModelRef("x", packed, packed, dtype=torch.float32)), batches(size), "cpu", "eager")
        states = walk.embed()
        for number in range(walk.layers):
            routed, states = outputs(walk, number, states)
            assert sum(map(len, routed.tokens)) == sum(LENGTHS) * TinyConfig().num_experts_per_tok
        found.append(states)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_fused_attention_gives_the_states_of_eager_attention(packed: Path) -> None:
    found = []
    for implementation in (EAGER, FUSED_SINKS):
        walk = Walk(Weights(ModelRef("x", packed, packed, dtype=torch.float32)), batches(3), "cpu", implementation)
        states = walk.embed()
        for number in range(walk.layers):
            states = outputs(walk, number, states)[1]
        found.append(states)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_head_gives_the_logits_of_transformers(packed: Path) -> None:
    model = loading.load_plain(packed, torch.float32, experts_implementation="eager")
    walk = Walk(Weights(ModelRef("x", packed, packed, dtype=torch.float32)), batches(1)[:1], "cpu", "eager")
    states = walk.embed()
    for number in range(walk.layers):
        states = outputs(walk, number, states)[1]
    with torch.no_grad(), walk.head() as (norm, head):
        expected = model(input_ids=batches(1)[0]["input_ids"], use_cache=False).logits[0]
        torch.testing.assert_close(norm(states) @ head.T, expected)


def parameter_bytes() -> int:
    """Return the bytes of all parameters in memory that have values."""
    parameters = [each for each in gc.get_objects() if issubclass(type(each), torch.nn.Parameter)]
    return sum(each.nbytes for each in parameters if not streaming.is_hollow(each))


def test_a_layer_has_no_expert_weights_and_is_freed_after_use(packed: Path) -> None:
    weights = Weights(ModelRef("x", packed, packed))
    walk = Walk(weights, batches(1), "cpu", "eager")
    before = parameter_bytes()
    with walk.layer(0):
        found = parameter_bytes() - before
    others = [name for name in weights.names() if ".layers.0." in name and not name.endswith((GATE_UP, DOWN))]
    assert found == sum(weights.read_trained(name).nbytes for name in others)
    assert parameter_bytes() == before
