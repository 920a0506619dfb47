"""Rounded weights are cached until the weights change."""

import pytest
import torch
from torch import Tensor

from pipeline.config import Sharding
from pipeline.models import rounded_weights
from pipeline.models.rounded_weights import NonFinite, RoundedWeights, budget_bytes
from pipeline.numerics.codec import CodecError, fake_quantize, straight_through
from pipeline.numerics.formats import MXFP4


class Rounder:
    """Rounds to whole numbers and counts its calls."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.calls = weight, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.weight.detach().round()


def parameter(*values: float) -> Tensor:
    return torch.nn.Parameter(torch.tensor(values))


def test_without_a_setting_gpus_and_gathered_weights_have_no_cache_and_a_cpu_has_a_small_one() -> None:
    assert 0 < budget_bytes(None, Sharding.none, on_gpu=False) <= 2**30  # 4 GiB killed QAT of 20b on 24 GB
    assert budget_bytes(None, Sharding.fsdp2, on_gpu=False) == 0
    assert budget_bytes(None, Sharding.none, on_gpu=True) == budget_bytes(None, Sharding.zero2, on_gpu=True) == 0


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("shared", [Sharding.none, Sharding.fsdp2])
def test_a_setting_decides_on_every_device(shared: Sharding, on_gpu: bool) -> None:
    assert budget_bytes(2.5, shared, on_gpu=on_gpu) == 2.5 * 2**30


def test_weights_are_rounded_once_until_they_are_forgotten() -> None:
    weight, kept = parameter(0.4, 1.6), RoundedWeights()
    rounder = Rounder(weight)
    first, second = (kept.of("w", weight, rounder) for _ in range(2))
    assert first is second and rounder.calls == 1
    kept.forget()
    kept.of("w", weight, rounder)
    assert rounder.calls == 2


def test_a_parameter_that_an_optimizer_changed_is_rounded_again() -> None:
    weight, kept = parameter(0.4, 1.6), RoundedWeights()
    rounder = Rounder(weight)
    kept.of("w", weight, rounder)
    weight.grad = torch.ones(2)
    torch.optim.SGD([weight], lr=1.0).step()
    assert kept.of("w", weight, rounder).tolist() == [-1.0, 1.0]


def test_weights_beyond_the_budget_are_rounded_every_time() -> None:
    small, large = parameter(0.4), parameter(*[0.4] * 100)
    kept = RoundedWeights(budget_bytes=100)
    rounders = {"small": Rounder(small), "large": Rounder(large)}
    for _ in range(3):
        kept.of("large", large, rounders["large"])
        kept.of("small", small, rounders["small"])
    assert (rounders["small"].calls, rounders["large"].calls) == (1, 3)
    assert kept.bytes == 4


def test_a_budget_of_zero_caches_nothing() -> None:
    weight, kept = parameter(0.4), RoundedWeights(budget_bytes=0)
    rounder = Rounder(weight)
    kept.of("w", weight, rounder)
    kept.of("w", weight, rounder)
    assert rounder.calls == 2 and kept.bytes == 0


def test_the_gradient_comes_in_the_type_of_the_weight() -> None:
    weight = parameter(0.4, 1.6)
    rounded = straight_through(weight, weight.detach().round().bfloat16())
    assert rounded.dtype is torch.bfloat16 and rounded.tolist() == [0.0, 2.0]
    (rounded * torch.tensor([2.0, 3.0], dtype=torch.bfloat16)).sum().backward()
    assert weight.grad is not None and weight.grad.dtype is torch.float32
    assert weight.grad.tolist() == [2.0, 3.0]


def test_cached_weights_never_get_a_graph() -> None:
    weight, kept = parameter(0.4), RoundedWeights()
    values = kept.of("w", weight, Rounder(weight))
    assert straight_through(weight, values).requires_grad
    assert not values.requires_grad


def test_a_cpu_needs_no_flag_because_the_codec_raises_at_once() -> None:
    found = NonFinite()
    assert found.flag(torch.device("cpu")) is None
    found.raise_if_any()


def test_a_flag_that_the_codec_has_set_stops_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test uses a CPU in place of a GPU. Both calls of `flag` return the same tensor."""
    monkeypatch.setattr(rounded_weights, "_CHECKED_AT_ONCE", frozenset())
    found, device = NonFinite(), torch.device("cpu")
    weights = torch.ones(2, 32)
    fake_quantize(weights, MXFP4, is_bad=found.flag(device))
    found.raise_if_any()
    weights[1, 3] = float("nan")
    fake_quantize(weights, MXFP4, is_bad=found.flag(device))
    with pytest.raises(CodecError, match="NaN or Inf in the weights of experts"):
        found.raise_if_any()
