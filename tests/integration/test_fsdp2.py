"""FSDP2 gathers and reduces in the right types, and no more often than necessary."""

import json
from collections import Counter
from typing import Any

import collectives
import pytest
from test_processes import launch

from pipeline.config import TinyConfig
from pipeline.models.tiny_model import create_tiny

LAYERS = 3
GATHER, REDUCE = "_allgather_base_", "_reduce_scatter_base_"


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes recorded in two forward and backward passes, without an optimizer step between them."""
    root = tmp_path_factory.mktemp("fsdp2")
    create_tiny(root / "tiny", TinyConfig(num_hidden_layers=LAYERS))
    outcome = launch(collectives.__file__, str(root / "tiny"), str(root / "facts.json"))
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    found: dict[str, Any] = json.loads((root / "facts.json").read_text(encoding="utf-8"))
    return found


def test_weights_are_gathered_in_bf16_and_gradients_are_reduced_in_fp32(facts: dict[str, Any]) -> None:
    for each in facts["passes"]:
        assert {tuple(pair) for pair in each} == {(GATHER, "torch.bfloat16"), (REDUCE, "torch.float32")}
    assert facts["stored"] == ["DTensor torch.float32"]


def test_the_residual_stream_is_fp32_as_under_autocast(facts: dict[str, Any]) -> None:
    assert facts["layers"] == [["input", "torch.float32"], ["output", "torch.float32"], ["weight", "torch.bfloat16"]]


def test_checkpointing_does_not_gather_a_layer_twice_in_the_backward_pass(facts: dict[str, Any]) -> None:
    """A pass gathers embedding, layers and head, and for the backward pass the embedding and the layers again."""
    for each in facts["passes"]:
        assert Counter(name for name, _ in each) == {GATHER: 2 * LAYERS + 3, REDUCE: LAYERS + 2}


def test_each_pass_leaves_only_the_gradients_of_the_own_shard(facts: dict[str, Any]) -> None:
    assert facts["gradients"] == ["DTensor torch.float32"]
