"""The relative errors of expert weights and the shares of flipped codes are right for a small model.

The tests compute both directly from the weights.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.checkpoints.gpt_oss import Shape, expert_projections
from pipeline.evaluate.scorers import weights
from pipeline.evaluate.subject import Subject
from pipeline.models.references import ModelRef
from pipeline.numerics.codec import fake_quantize
from pipeline.numerics.formats import MXFP4

SHAPE = Shape(
    num_hidden_layers=1,
    num_local_experts=3,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    vocab_size=300,
)


@dataclass
class Held:
    """Expert weights in memory, with the methods that the scorer calls."""

    tensors: dict[str, Tensor]
    shape: Shape = SHAPE

    def read_effective(self, name: str) -> Tensor:
        return self.tensors[name]

    def importance(self, name: str) -> None:
        return None


def round_weight(weight: Tensor) -> Tensor:
    return fake_quantize(weight.transpose(1, 2), MXFP4).transpose(1, 2)


@pytest.fixture
def reference() -> Held:
    generator = torch.Generator().manual_seed(0)
    return Held(
        {
            each.name: torch.randn(each.experts, each.in_features, each.out_features, generator=generator)
            for each in expert_projections(SHAPE)
        }
    )


def score(own: dict[str, Tensor], reference: Held, is_rounded: bool) -> dict[str, float]:
    ref = ModelRef("m", Path(), Path())
    subject = Subject(replace(ref, block_format=MXFP4 if is_rounded else None), None, Held(own), reference, [])
    return weights.score(subject)


def test_the_reference_itself_has_no_error_and_no_flips(reference: Held) -> None:
    assert score(reference.tensors, reference, False) == {"relative_weight_error": 0.0, "flipped_codes": 0.0}


def test_a_rounded_reference_has_the_error_of_rounding_and_no_flips(reference: Held) -> None:
    own = {name: round_weight(weight) for name, weight in reference.tensors.items()}
    found = score(own, reference, True)
    wanted, given = (
        torch.cat([each.flatten() for each in held.values()]).double() for held in (reference.tensors, own)
    )
    error = float((wanted - given).norm() / wanted.norm())
    assert found["relative_weight_error"] == pytest.approx(error)
    assert found["snr_db"] == pytest.approx(-20 * math.log10(error))
    assert found["flipped_codes"] == 0.0


@pytest.mark.parametrize("is_rounded", [True, False])
def test_each_weight_with_another_code_is_one_flip(reference: Held, is_rounded: bool) -> None:
    own = {name: round_weight(weight) for name, weight in reference.tensors.items()}
    name = next(iter(own))
    block = own[name][2, :32, 5]
    largest = block.abs().argmax()
    others = [i for i in range(32) if i != int(largest)][:4]
    block[others] = torch.where(block[others] == 0, block[largest], torch.zeros(4))
    count = sum(weight.numel() for weight in own.values())
    assert score(own, reference, is_rounded)["flipped_codes"] == 4 / count


def test_weights_that_moved_within_their_rounding_flip_no_code(reference: Held) -> None:
    own = {name: weight + 0.01 * (round_weight(weight) - weight) for name, weight in reference.tensors.items()}
    found = score(own, reference, False)
    assert found["relative_weight_error"] > 0
    assert found["flipped_codes"] == 0.0
