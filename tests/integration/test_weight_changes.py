"""The reported shares of changed weights and changed 4-bit codes are the same as in a count by hand."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pipeline.config import LoraTarget, Precision, TrainConfig
from pipeline.models import adapters, loading, references
from pipeline.numerics import low_rank
from pipeline.numerics.formats import MXFP4
from pipeline.runs import artifacts
from pipeline.runs.metrics import read_metrics
from pipeline.training import weight_changes
from pipeline.training.weight_changes import WeightChanges

FP32 = TrainConfig(precision=Precision.fp32)


@pytest.fixture
def model(smoke_run: Path) -> PreTrainedModel:
    return loading.load_to_train(references.of_artifact(artifacts.load(smoke_run / "upcast")), FP32, "eager")


def test_nothing_has_moved_at_the_start(model: PreTrainedModel) -> None:
    assert WeightChanges(model, MXFP4).measure() == {"moved_weights": 0.0, "changed_codes": 0.0}


def test_moved_weights_and_changed_codes_are_counted_in_the_first_expert_of_each_stack(model: PreTrainedModel) -> None:
    stacks = [p.data for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]
    total = sum(stack[0].numel() for stack in stacks)
    changes = WeightChanges(model, MXFP4)
    block = stacks[0][0, :32, 0]  # one block, whose values lie on the grid of the format
    block[1] *= 1.01  # the weight moves, but is rounded to the same code
    largest = int(block.abs().argmax())
    block[largest] *= -1  # the code changes, but not the scale of the block
    stacks[1][1] *= 3  # this expert is not sampled, so its change is not counted
    moved = 2 if float(block[1]) != 0 and largest != 1 else 1
    assert changes.measure() == {"moved_weights": moved / total, "changed_codes": 1 / total}


def test_changes_by_adapters_count_as_moved(model: PreTrainedModel) -> None:
    settings = TrainConfig(precision=Precision.fp32)
    settings.lora.targets, settings.lora.layers = [LoraTarget.experts], [1]
    adapted = adapters.attach(model, settings, "sft")
    changes = WeightChanges(adapted, MXFP4)
    assert changes.measure() == {"moved_weights": 0.0, "changed_codes": 0.0}  # the factor B is zero at the start
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert changes.measure()["moved_weights"] > 0.95
    assert 0 < changes.measure()["changed_codes"] <= 1


@pytest.mark.parametrize("experts", [slice(0, 1), slice(2, 5), slice(7, 8), slice(None)])
def test_adapters_are_multiplied_out_only_for_the_sampled_experts(
    model: PreTrainedModel, experts: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainConfig(precision=Precision.fp32)
    settings.lora.targets = [LoraTarget.experts]
    adapted = adapters.attach(model, settings, "sft")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    whole = dict(adapters.expert_weights(adapted, slice(None)))
    made: list[int] = []
    merge = low_rank.merge

    def record(base: torch.Tensor, *factors: Any) -> torch.Tensor:
        made.append(len(base))
        return merge(base, *factors)

    monkeypatch.setattr(low_rank, "merge", record)
    for name, weights in adapters.expert_weights(adapted, experts):
        torch.testing.assert_close(weights, whole[name][experts], rtol=1e-6, atol=1e-6)
    assert set(made) == {len(range(8)[experts])}
    factors = [parameter.shape for name, parameter in adapted.named_parameters() if "lora_A" in name]
    assert {shape[0] for shape in factors} == {8 * settings.lora.rank}


def test_the_sample_of_one_stack_is_freed_before_the_next_one_is_made(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    samples: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def watch(watched: torch.nn.Module, experts: slice) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in watched.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):
                alive.append(len(samples))
                made = [parameter.detach()[experts].clone()]
                samples.add(made[0])
                yield name, made.pop()

    monkeypatch.setattr(weight_changes, "expert_weights", watch)
    changes = WeightChanges(model, MXFP4)
    alive.clear()
    assert changes.measure() == {"moved_weights": 0.0, "changed_codes": 0.0}
    assert alive == [0, 0, 0, 0]


def test_without_trained_experts_there_are_no_figures(model: PreTrainedModel) -> None:
    settings = TrainConfig(precision=Precision.fp32)
    settings.lora.targets = [LoraTarget.attention]
    assert WeightChanges(adapters.attach(model, settings, "sft"), MXFP4).measure() == {}


def test_every_validation_reports_the_changes(smoke_run: Path) -> None:
    for stage in ("sft", "qat"):
        lines = [line for line in read_metrics(smoke_run / stage) if "eval_loss" in line]
        assert lines[0]["eval_moved_weights"] == 0.0
        assert 0 < lines[-1]["eval_changed_codes"] < lines[-1]["eval_moved_weights"] <= 1
