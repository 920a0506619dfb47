"""Weights that flip between two values of the format are counted, and held at their mean if the user asks for it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from pipeline.config import Method, Oscillation, Precision, QatConfig, Sharding
from pipeline.numerics import codec
from pipeline.numerics.codec import fake_quantize
from pipeline.numerics.formats import FORMATS, MXFP4
from pipeline.training import flips, oscillation
from pipeline.training.oscillation import Holder, OscillationCount

NVFP4 = FORMATS["nvfp4"]
FP32 = torch.float32
EXPERTS, IN, OUT = 3, 64, 4


class Experts(nn.Module):
    """A stack of experts (E, in, out). The largest value of each block is 6, so that the values 0 to 6 have scale 1."""

    def __init__(self, dtype: torch.dtype = FP32) -> None:
        super().__init__()
        stack = torch.zeros(EXPERTS, IN, OUT, dtype=dtype)
        stack[:, ::16] = 6
        self.down_proj = nn.Parameter(stack)


class Training:
    """The steps of a trainer that has callbacks. `step` writes weights, as an optimizer does."""

    def __init__(self, model: Experts, directory: Path, *callbacks: Holder | OscillationCount, done: int = 0) -> None:
        self.model, self.callbacks = model, callbacks
        self.args = TrainingArguments(output_dir=str(directory), report_to="none", use_cpu=True)
        self.state, self.control = TrainerState(global_step=done), TrainerControl()
        for each in callbacks:
            each.on_train_begin(self.args, self.state, self.control)

    @torch.no_grad()
    def step(self, values: dict[tuple[int, int, int], float]) -> None:
        for place, value in values.items():
            self.model.down_proj[place] = value
        for each in self.callbacks:
            each.on_optimizer_step(self.args, self.state, self.control)
        self.state.global_step += 1

    def save(self) -> None:
        (Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}").mkdir()
        for each in self.callbacks:
            each.on_save(self.args, self.state, self.control)


def rounded(model: Experts) -> Tensor:
    return fake_quantize(model.down_proj.detach().transpose(1, 2), MXFP4).transpose(1, 2)


FLIPPING = (1, 3, 2)
"""A weight that alternates between 1.2 and 1.3. The threshold between the values 1 and 1.5 is 1.25."""
RISING = (2, 5, 0)
"""A weight that rises by a third of the step of the format, again and again."""


def alternate(training: Training, steps: range) -> None:
    for step in steps:
        training.step({FLIPPING: 1.3 if step % 2 else 1.2, RISING: 0.15 * step})


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
def test_a_weight_that_flips_is_held_at_the_mean_of_its_rounded_values(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Experts(dtype)
    training = Training(model, tmp_path, Holder(model, MXFP4, dtype, "qat"))
    alternate(training, range(20))
    held = model.down_proj[FLIPPING].item()
    assert 1 < held < 1.5
    training.step({FLIPPING: 5.0})
    assert model.down_proj[FLIPPING].item() == held


def test_the_mean_is_near_the_value_that_the_weight_has_more_often(tmp_path: Path) -> None:
    model = Experts()
    training = Training(model, tmp_path, Holder(model, MXFP4, FP32, "qat"))
    for step in range(31):
        training.step({FLIPPING: 1.3 if step % 6 == 5 else 1.2})
    assert float(rounded(model)[FLIPPING]) == 1
    training.step({FLIPPING: 1.3})
    assert float(rounded(model)[FLIPPING]) == 1


def test_a_weight_that_moves_steadily_is_not_held(tmp_path: Path) -> None:
    model = Experts()
    holder = Holder(model, MXFP4, FP32, "qat")
    training = Training(model, tmp_path, holder)
    alternate(training, range(30))
    assert model.down_proj[RISING].item() == pytest.approx(0.15 * 29)
    assert holder.measure() == {"held_weights": 1 / (EXPERTS * IN * OUT)}


def test_a_weight_that_flips_rarely_is_not_held(tmp_path: Path) -> None:
    model = Experts()
    holder = Holder(model, MXFP4, FP32, "qat")
    training = Training(model, tmp_path, holder)
    for step in range(300):
        training.step({FLIPPING: 1.3 if step // 40 % 2 else 1.2})
    assert holder.measure() == {"held_weights": 0.0}


def test_a_large_stack_is_held_like_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for at_once in (1, 1 << 22):
        monkeypatch.setattr(flips, "_VALUES_AT_ONCE", at_once)
        model = Experts()
        alternate(Training(model, tmp_path, Holder(model, MXFP4, FP32, "qat")), range(20))
        found.append(model.down_proj.detach())
    assert torch.equal(*found)


def test_resumed_training_holds_the_same_weights_at_the_same_bits(tmp_path: Path) -> None:
    whole, part = Experts(), Experts()
    first = Training(part, tmp_path, Holder(part, MXFP4, FP32, "qat"))
    for training, last in ((Training(whole, tmp_path, Holder(whole, MXFP4, FP32, "qat")), 40), (first, 3)):
        alternate(training, range(last))
    first.save()
    resumed = Experts()
    resumed.load_state_dict(part.state_dict())
    alternate(Training(resumed, tmp_path, Holder(resumed, MXFP4, FP32, "qat"), done=3), range(3, 40))
    assert torch.equal(resumed.down_proj, whole.down_proj)
    fresh = Experts()
    fresh.load_state_dict(part.state_dict())
    alternate(Training(fresh, tmp_path, Holder(fresh, MXFP4, FP32, "qat")), range(3, 40))
    assert not torch.equal(fresh.down_proj, whole.down_proj)  # the saved state made the difference


def test_codes_that_go_back_and_forth_are_counted_anew_after_each_validation(tmp_path: Path) -> None:
    model = Experts()
    count = OscillationCount(model, MXFP4, FP32, "qat")
    training = Training(model, tmp_path, count)
    assert count.measure() == {}  # no step was taken
    here, there = (0, 3, 2), (0, 5, 1)
    for value in (0.1, 0.4, 0.1):
        training.step({here: value, there: 2 * value, FLIPPING: value})  # FLIPPING is not in the first expert
    assert count.measure() == {"oscillating_codes": 2 / (IN * OUT)}
    training.step({here: 0.4})
    training.step({there: 3.0})
    assert count.measure() == {"oscillating_codes": 0.0}


def test_only_a_high_share_of_oscillating_codes_is_advised_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rows, is_high in ((0, False), (4, True)):
        model = Experts()
        count = OscillationCount(model, MXFP4, FP32, "qat")
        training = Training(model, tmp_path, count)
        for value in (0.1, 0.4, 0.1):
            training.step(
                {(0, row, column): value for row in range(1, 1 + rows) for column in range(OUT)} | {(0, 9, 0): value}
            )
        count.on_train_end(training.args, training.state, training.control)
        advice = "[qat] 6.6% of the sampled 4-bit values went back and forth in the last 3 steps."
        assert (advice in capsys.readouterr().out) == is_high


def test_nvfp4_is_rounded_with_the_tensor_scale_of_the_whole_expert(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.down_proj = nn.Parameter(torch.randn(2, 32, 200))
    with torch.no_grad():
        model.down_proj[:, :, 150] *= 1e5  # outside of the sampled columns
    count = OscillationCount(model, NVFP4, FP32, "qat")
    training = Training(model, tmp_path, count)  # type: ignore[arg-type]
    before = model.down_proj.detach().clone()
    for number in range(1, 4):
        with torch.no_grad():
            model.down_proj.copy_(before * (1.2 if number % 2 else 1))
        training.step({})
    sampled = before[0].T[:128]
    shares = []
    for scale in (codec.tensor_scale(before[0].T, NVFP4), codec.tensor_scale(sampled, NVFP4)):
        kept, moved = (fake_quantize(factor * sampled, NVFP4, scale) for factor in (1, 1.2))
        shares.append(float((kept != moved).double().mean()))
    # A change of less than 2 % of a value can be too small for the BF16 mean.
    assert count.measure()["oscillating_codes"] == pytest.approx(shares[0], abs=2e-3)
    assert abs(shares[0] - shares[1]) > 1e-2


@pytest.mark.parametrize("method", Method)
def test_only_training_of_all_weights_is_watched(method: Method) -> None:
    settings = QatConfig(method=method, precision=Precision.fp32, oscillation=Oscillation.hold)
    watched = oscillation.watch(Experts(), settings, MXFP4, Sharding.none)
    assert [type(each) for each in watched] == ([Holder, OscillationCount] if method is Method.full else [])
