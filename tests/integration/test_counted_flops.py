"""The FLOPs that `doctor` counts for a training pass are those of the products that a real pass computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import ExpertsImplementation, LoraConfig, Method, Precision, Sharding, TinyConfig, TrainConfig
from pipeline.data.examples import Splits
from pipeline.data.tokenizers import load_tokenizer
from pipeline.doctor import work
from pipeline.doctor.work import Batch, Model
from pipeline.models import adapters, expert_kernels, loading
from pipeline.models.attention import EAGER
from pipeline.models.references import ModelRef
from pipeline.models.tiny_model import create_tiny
from pipeline.numerics.formats import MXFP4
from pipeline.training import trainer
from pipeline.training.weight_changes import WeightChanges

TOKENS = 40


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("work") / "tiny"
    create_tiny(path, TinyConfig(num_hidden_layers=3, hidden_size=128, intermediate_size=128, head_dim=32))
    return path


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", Method)
def test_counted_flops_are_those_that_torch_counts(
    tiny: Path, tmp_path: Path, method: Method, checkpointing: bool
) -> None:
    """Adapters and BF16 parts train on packed experts. Products for biases and the first layer's inputs are ignored."""
    train = TrainConfig(
        method=method,
        lora=LoraConfig(rank=4),
        precision=Precision.fp32,
        gradient_checkpointing=checkpointing,
        batch_size=2,
        experts_implementation=ExpertsImplementation.eager,
    )
    batch = Batch(2 * TOKENS, TOKENS, EAGER, (TOKENS - 1) / TOKENS)
    sizes = Model.of(json.loads((tiny / "config.json").read_text()), tiny)
    packed = method is not Method.full
    counted = work.training_pass(sizes, train, batch, is_packed=packed, rounds=False, has_teacher=False)
    assert counted.fp32_flops == pytest.approx(torch_flops(tiny, tmp_path, train), rel=0.04)


def torch_flops(base: Path, directory: Path, train: TrainConfig) -> int:
    """Return the FLOPs of the products of one forward and backward pass, as torch counts them."""

    def attach(model: Any) -> Any:
        return adapters.attach(model, train, "sft", is_factored=True)

    model = loading.load_to_train(
        ModelRef("tiny", base, base), train, EAGER, attach=attach if train.method is Method.lora else None
    )
    expert_kernels.use(model, train.experts_implementation, None, train.precision)
    ids = torch.randint(0, 500, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    splits = Splits(data, data, {}, TOKENS, np.zeros(2, int))
    inputs = trainer.Inputs(model, load_tokenizer(base), splits, WeightChanges(model, MXFP4))
    made = trainer.make_trainer(inputs, trainer.Setup(train, "sft", directory, Sharding.none), {})
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    # torch has no formula for the product in place that the head's gradient uses.
    in_place = {torch.ops.aten.addmm_: lambda _, one, other, **__: 2 * one[0] * one[1] * other[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        made.compute_loss(model, {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}).backward()
    return counter.get_total_flops()
