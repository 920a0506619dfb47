"""The shares of weights and of 4-bit values that training moved, against a count by hand."""

from pathlib import Path

import pytest
import torch
from peft.tuners.lora import ParamWrapper
from pipeline.runs.metrics import read_metrics

from pipeline.config import LoraTarget, Precision, TrainConfig
from pipeline.models import adapters, loading, references
from pipeline.numerics.formats import MXFP4
from pipeline.runs import artifacts
from pipeline.training.weight_changes import Drift

FP32 = TrainConfig(precision=Precision.fp32)


@pytest.fixture
def model(smoke_run: Path) -> object:
    return loading.load_to_train(references.of_artifact(artifacts.load(smoke_run / "upcast")), FP32)


def test_nothing_has_moved_at_the_start(model: object) -> None:
    assert Drift(model, MXFP4).figures() == {"moved_weights": 0.0, "changed_codes": 0.0}


def test_moved_weights_and_changed_codes_are_counted_in_the_first_expert_of_each_stack(model: object) -> None:
    stacks = [p.data for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]  # type: ignore[attr-defined]
    total = sum(stack[0].numel() for stack in stacks)
    drift = Drift(model, MXFP4)
    block = stacks[0][0, :32, 0]  # one block, on the grid of the format
    block[1] *= 1.01  # moves, and snaps back
    largest = int(block.abs().argmax())
    block[largest] *= -1  # another code, the same scale
    stacks[1][1] *= 3  # of an expert that is not looked at
    moved = 2 if float(block[1]) != 0 and largest != 1 else 1
    assert drift.figures() == {"moved_weights": moved / total, "changed_codes": 1 / total}


def test_what_adapters_add_counts_as_moved(model: object) -> None:
    settings = TrainConfig(precision=Precision.fp32)
    settings.lora.targets, settings.lora.layers = [LoraTarget.experts], [1]
    adapted = adapters.attach(model, settings, "sft")
    drift = Drift(adapted, MXFP4)
    assert drift.figures() == {"moved_weights": 0.0, "changed_codes": 0.0}  # B is zero at the start
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert drift.figures()["moved_weights"] > 0.95
    assert 0 < drift.figures()["changed_codes"] <= 1


@pytest.mark.parametrize("experts", [slice(0, 1), slice(2, 5), slice(7, 8), slice(None)])
def test_what_adapters_add_is_made_for_the_experts_that_are_looked_at(
    model: object, experts: slice, monkeypatch: pytest.MonkeyPatch
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
    delta = ParamWrapper.get_delta_weight

    def noting(wrapper: ParamWrapper, adapter: str) -> torch.Tensor:
        made.append(len(delta(wrapper, adapter)))
        return delta(wrapper, adapter)

    monkeypatch.setattr(ParamWrapper, "get_delta_weight", noting)
    for name, weights in adapters.expert_weights(adapted, experts):
        torch.testing.assert_close(weights, whole[name][experts], rtol=1e-6, atol=1e-6)
    assert set(made) == {max(2, len(range(8)[experts]))}
    factors = [parameter.shape for name, parameter in adapted.named_parameters() if "lora_A" in name]
    assert {shape[0] for shape in factors} == {8 * settings.lora.rank}


def test_without_experts_to_train_there_is_nothing_to_tell(model: object) -> None:
    settings = TrainConfig(precision=Precision.fp32)
    settings.lora.targets = [LoraTarget.attention]
    assert Drift(adapters.attach(model, settings, "sft"), MXFP4).figures() == {}


def test_every_validation_tells_how_far_training_has_come(smoke_run: Path) -> None:
    for stage in ("sft", "qat"):
        told = [line for line in read_metrics(smoke_run / stage) if "eval_loss" in line]
        assert told[0]["eval_moved_weights"] == 0.0
        assert 0 < told[-1]["eval_changed_codes"] < told[-1]["eval_moved_weights"] <= 1
