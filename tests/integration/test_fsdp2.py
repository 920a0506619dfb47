"""FSDP2 gathers and reduces in the right types, and no more often than necessary."""

import json
from collections import Counter
from typing import Any

import collectives
import pytest
from forks import run_processes

from pipeline.config import TinyConfig
from pipeline.models.tiny_model import create_tiny

LAYERS = 3
TRAINING = """
import json
import os
import sys
from pathlib import Path

from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from pipeline import __main__ as program
from pipeline.models import sharding
from pipeline.training import trainer

run_dir, results = sys.argv[1:]
delayed, run, switch = [], trainer._run, FSDPModule.set_requires_gradient_sync
gathered, gather, step = [], _fsdp_param_group.foreach_all_gather, trainer._Trainer.training_step
facts = {"gathers": {}, "metrics": []}

def observe_switch(module, is_on, **more):
    delayed.append(not is_on)
    switch(module, is_on, **more)

def observe_gather(parameters, *others):
    gathered.append(parameters[0]._module_info.module)
    return gather(parameters, *others)

def observe_step(made, model, *others):
    gathered.clear()
    result = step(made, model, *others)
    names = {id(module): name for name, module in model.named_modules()}
    units = [".".join(names[id(module)].split(".")[1:3]) for module in gathered]
    facts["gathers"].setdefault(str(made.reshards), []).append(units)
    return result

def observe_run(made, setup, *others):
    made.reshards = setup.settings.reshard_after_forward
    run(made, setup, *others)
    sharding.reshard(made.model)
    optimized = [id(p) for group in made.optimizer.param_groups for p in group["params"]]
    trained = [id(p) for p in made.model.parameters() if p.requires_grad]
    empty = sum(p.to_local().numel() == 0 for p in made.model.parameters())
    facts.update(empty=empty, same=sorted(optimized) == sorted(trained), delayed=any(delayed))

FSDPModule.set_requires_gradient_sync, trainer._run = observe_switch, observe_run
_fsdp_param_group.foreach_all_gather, trainer._Trainer.training_step = observe_gather, observe_step
settings = ["recipe=smoke", f"run_dir={run_dir}", "data.max_samples=40", "sft.max_steps=2", "sft.eval_steps=2"]
settings += ["sft.save_steps=2", "sft.gradient_accumulation_steps=2", "sft.batch_size=1", "sharding=fsdp2"]
settings += ["sft.precision=mixed_bf16", "sft.packing=true", "sft.gradient_checkpointing=true", "sft.logging_steps=1"]
for stage, more in (("upcast", ()), ("sft", ()), ("sft", ("sft.reshard_after_forward=false", "overwrite=true"))):
    sys.argv = ["pipeline", f"stage={stage}", *settings, *more]
    assert program.status(sys.argv[1:]) == 0
    if stage == "sft":
        facts["metrics"].append(Path(run_dir, stage, "metrics.jsonl").read_text())
Path(f"{results}.{os.environ['RANK']}").write_text(json.dumps(facts))
"""
GATHER, REDUCE = "_allgather_base_", "_reduce_scatter_base_"


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes recorded in two forward and backward passes, without an optimizer step between them."""
    root = tmp_path_factory.mktemp("fsdp2")
    create_tiny(root / "tiny", TinyConfig(num_hidden_layers=LAYERS))
    outcome = run_processes(collectives.__file__, str(root / "tiny"), str(root / "facts.json"))
    assert outcome.returncode == 0, outcome.stdout[-3000:]
    found: dict[str, Any] = json.loads((root / "facts.json").read_text(encoding="utf-8"))
    return found


def test_weights_are_gathered_in_bf16_and_gradients_are_reduced_in_fp32(facts: dict[str, Any]) -> None:
    for each in facts["passes"]:
        assert {tuple(pair) for pair in each} == {(GATHER, "torch.bfloat16"), (REDUCE, "torch.float32")}
    assert facts["stored"] == ["DTensor torch.float32"]


def test_the_residual_stream_is_fp32_as_under_autocast(facts: dict[str, Any]) -> None:
    assert facts["layers"] == [["input", "torch.float32"], ["output", "torch.float32"], ["weight", "torch.bfloat16"]]


def test_checkpointing_does_not_gather_a_layer_twice_in_the_backward_pass(facts: dict[str, Any]) -> None:
    """The forward pass gathers embedding, layers and head.

    The backward pass gathers every layer again, except the last one.
    """
    for each in facts["passes"]:
        assert Counter(name for name, _ in each) == {GATHER: 2 * LAYERS + 1, REDUCE: LAYERS + 2}


def test_a_layer_computes_after_the_gather_of_the_next_unit_began(facts: dict[str, Any]) -> None:
    """Before layer 0 computes, the gathers of the embedding, of layer 0 and of layer 1 have begun."""
    assert facts["before"] == [layer + 3 for layer in range(LAYERS)]


def test_each_pass_leaves_only_the_gradients_of_the_own_shard(facts: dict[str, Any]) -> None:
    assert facts["gradients"] == ["DTensor torch.float32"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes saw in two trainings, both with packing and accumulation.

    `reshard_after_forward` is true in the first training, and false in the second.
    """
    root = tmp_path_factory.mktemp("trained")
    (root / "training.py").write_text(TRAINING, encoding="utf-8")
    outcome = run_processes(str(root / "training.py"), str(root / "run"), str(root / "facts"), processes=3)
    assert outcome.returncode == 0, outcome.stdout[-3000:]
    return [json.loads((root / f"facts.{rank}").read_text(encoding="utf-8")) for rank in range(3)]


def test_the_optimizer_keeps_parameters_of_which_a_process_holds_no_rows(trained: list[dict[str, Any]]) -> None:
    assert trained[2]["empty"] > 1
    assert all(facts["same"] for facts in trained)


def test_accumulation_does_not_keep_the_gradients_of_the_whole_model(trained: list[dict[str, Any]]) -> None:
    assert not any(facts["delayed"] for facts in trained)


UNITS = ["embed_tokens", "layers.0", "layers.1", "norm"]  # the final norm and the head are one unit
PASSES = 3  # Two steps have two passes each. After the first validation, FSDP2 prefetches a unit in vain in pass 1.


def test_a_pass_gathers_the_last_layer_once_and_the_other_layers_twice(trained: list[dict[str, Any]]) -> None:
    """The last layer stays gathered until its backward pass, and the backward pass does not use the embedding."""
    for facts in trained:
        assert facts["gathers"]["True"][1:] == [[*UNITS, "layers.0"]] * PASSES


def test_without_resharding_a_pass_gathers_each_unit_once(trained: list[dict[str, Any]]) -> None:
    for facts in trained:
        assert facts["gathers"]["False"][1:] == [UNITS] * PASSES


def test_resharding_does_not_change_the_metrics(trained: list[dict[str, Any]]) -> None:
    """The metrics include the share of changed weights. It is measured after a validation, which gathers weights."""
    resharded, kept = ([json.loads(line) for line in lines.splitlines()] for lines in trained[0]["metrics"])
    names = {"loss", "grad_norm", "eval_loss", "eval_moved_weights", "eval_changed_codes"}
    found = [[{name: line[name] for name in names & line.keys()} for line in lines] for lines in (resharded, kept)]
    assert found[0] == found[1]
    assert set().union(*found[0]) == names and found[0][-1]["eval_moved_weights"] > 0
