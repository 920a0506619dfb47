"""QAT rounds the experts once per optimizer step. Losses and weights are the same as with rounding in every pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ONE_LAYER, SHORT, linked, run_program

from pipeline.config import TinyConfig
from pipeline.models import fake_quantizers, quantizer_backend
from pipeline.numerics import packed_rounding
from pipeline.numerics.codec import encode, fake_quantize
from pipeline.runs import artifacts
from pipeline.runs.metrics import read_metrics

STEPS, ACCUMULATED = 3, 4
EXPERTS = TinyConfig().num_local_experts
BY_HAND = (
    *SHORT,
    f"qat.max_steps={STEPS}",
    f"qat.gradient_accumulation_steps={ACCUMULATED}",
    "qat.batch_size=1",
    "qat.gradient_checkpointing=true",
    "qat.logging_steps=1",
    "qat.eval_steps=100",
    "qat.save_steps=100",
)


@pytest.fixture
def roundings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list of numbers. Each call of the codec appends the number of experts that it rounds."""
    seen: list[int] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(values: torch.Tensor, *others: object, **more: object) -> Any:
            seen.append(len(values))
            return function(values, *others, **more)

        return call

    for function in (fake_quantize, encode):  # packed experts are kept encoded
        monkeypatch.setattr(quantizer_backend, function.__name__, counted(function))
    monkeypatch.setattr(packed_rounding, "fake_quantize", counted(fake_quantize))
    return seen


def trained(run_dir: Path, source: Path, *settings: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Run QAT on the quantized model of the run `source`. Return the losses and the trained weights."""
    from safetensors.torch import load_file

    linked(run_dir, source, "upcast", "sft", "quantize")
    assert run_program("stage=qat", f"run_dir={run_dir}", *settings) == 0
    losses = [line["loss"] for line in read_metrics(run_dir / "qat") if "loss" in line]
    files = sorted((run_dir / "qat").glob("*.safetensors"))
    return losses, {name: tensor for file in files for name, tensor in load_file(file).items()}


# Each step rounds once, and so does the validation after the last step. The validation before training and the first
# step share one rounding.
ROUNDED_TIMES = STEPS + 1


@pytest.mark.parametrize(
    ("recipe", "once"),
    # Two layers have two stacks each. With adapters on one layer, the packed experts of the other layer need no
    # rounding, because they are values of the format.
    [("smoke", 4 * EXPERTS * ROUNDED_TIMES), ("smoke_lora", 2 * EXPERTS * ROUNDED_TIMES)],
)
def test_the_experts_are_rounded_once_per_step_with_the_losses_of_rounding_in_every_pass(
    recipe: str, once: int, tmp_path: Path, request: pytest.FixtureRequest, roundings: list[int]
) -> None:
    run = request.getfixturevalue("smoke_run" if recipe == "smoke" else "lora_run")
    layers = ONE_LAYER if recipe == "smoke_lora" else ()
    settings = (f"recipe={recipe}", *BY_HAND, *layers)
    roundings.clear()
    losses, weights = trained(tmp_path / "once", run, *settings)
    assert sum(roundings) == once
    roundings.clear()
    every_time, same_weights = trained(tmp_path / "always", run, *settings, "qat.rounded_cache_gib=0")
    assert sum(roundings) > once + 2 * EXPERTS * ACCUMULATED * STEPS
    assert losses == every_time
    assert weights.keys() == same_weights.keys()
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)


def test_frozen_experts_are_rounded_once_and_the_adapters_learn_the_same(
    smoke_run: Path, tmp_path: Path, roundings: list[int]
) -> None:
    attention = ("qat.method=lora", "qat.lora.targets=[attention]", "qat.precision=fp32")
    run_dir = linked(tmp_path / "run", smoke_run, "upcast", "sft")
    settings = ("recipe=smoke", *BY_HAND, *attention)
    assert run_program("stage=quantize", f"run_dir={run_dir}", *settings) == 0
    roundings.clear()
    assert run_program("stage=qat", f"run_dir={run_dir}", *settings) == 0
    assert len(roundings) == 4
    assert artifacts.load(run_dir / "qat").details["quantizers"] == 4


def test_what_is_kept_is_no_part_of_what_is_saved(smoke_run: Path) -> None:
    state = torch.load(smoke_run / "qat" / fake_quantizers.STATE_FILE, weights_only=False)

    def strings(value: object) -> set[str]:
        if isinstance(value, dict):
            return {str(key) for key in value} | {s for each in value.values() for s in strings(each)}
        if isinstance(value, (list, tuple)):
            return {s for each in value for s in strings(each)}
        return set()

    names = strings(state)
    assert any(name.endswith("_weight_quantizer") for name in names)
    assert not any("quantizer_cache" in name or "pipeline" in name for name in names if not name.startswith("model."))
