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
TRAINING = """
import json
import sys
from pathlib import Path

from torch.distributed.fsdp import FSDPModule

from pipeline import __main__ as program
from pipeline.models import sharding
from pipeline.training import trainer

run_dir, results = sys.argv[1:]
delayed, run, switch = [], trainer._run, FSDPModule.set_requires_gradient_sync

def observe_switch(module, is_on, **more):
    delayed.append(not is_on)
    switch(module, is_on, **more)

def observe_run(made, *others):
    run(made, *others)
    sharding.reshard(made.model)
    optimized = [id(p) for group in made.optimizer.param_groups for p in group["params"]]
    trained = [id(p) for p in made.model.parameters() if p.requires_grad]
    empty = sum(p.to_local().numel() == 0 for p in made.model.parameters())
    facts = {"empty": empty, "same": sorted(optimized) == sorted(trained), "delayed": any(delayed)}
    Path(f"{results}.{made.args.process_index}").write_text(json.dumps(facts))

FSDPModule.set_requires_gradient_sync, trainer._run = observe_switch, observe_run
settings = ["recipe=smoke", f"run_dir={run_dir}", "data.max_samples=40", "sft.max_steps=1", "sft.eval_steps=1"]
settings += ["sft.save_steps=1", "sft.gradient_accumulation_steps=3", "sft.batch_size=1", "sharding=fsdp2"]
for stage in ("upcast", "sft"):
    sys.argv = ["pipeline", f"stage={stage}", *settings]
    assert program.status(sys.argv[1:]) == 0
"""
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
    """The forward pass gathers embedding, layers and head. The backward pass gathers embedding and layers again."""
    for each in facts["passes"]:
        assert Counter(name for name, _ in each) == {GATHER: 2 * LAYERS + 3, REDUCE: LAYERS + 2}


def test_each_pass_leaves_only_the_gradients_of_the_own_shard(facts: dict[str, Any]) -> None:
    assert facts["gradients"] == ["DTensor torch.float32"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes saw when it trained with accumulation."""
    root = tmp_path_factory.mktemp("trained")
    (root / "training.py").write_text(TRAINING, encoding="utf-8")
    outcome = launch(str(root / "training.py"), str(root / "run"), str(root / "facts"), processes=3)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return [json.loads((root / f"facts.{rank}").read_text(encoding="utf-8")) for rank in range(3)]


def test_the_optimizer_keeps_parameters_of_which_a_process_holds_no_rows(trained: list[dict[str, Any]]) -> None:
    assert trained[2]["empty"] > 1
    assert all(facts["same"] for facts in trained)


def test_accumulation_does_not_keep_the_gradients_of_the_whole_model(trained: list[dict[str, Any]]) -> None:
    assert not any(facts["delayed"] for facts in trained)
