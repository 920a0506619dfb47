"""The check of attention implementations, on correct and on deliberately wrong implementations."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from pipeline.config import Precision, TrainConfig
from pipeline.errors import UserError
from pipeline.models import attention, sink_attention
from pipeline.models.attention import FUSED_SINKS
from pipeline.training import attention_check

CPU = torch.device("cpu")
NAME = "attention_under_test"
Attention: TypeAlias = Callable[..., tuple[Tensor, None]]


def repeat_heads(module: nn.Module, states: Tensor) -> Tensor:
    return states.repeat_interleave(module.num_key_value_groups, dim=1)


def online(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Compute correct attention, but in a different way from `eager`.

    As in fused kernels, the softmax leaves out the sink. The result is then rescaled to account for the sink.
    """
    scores = query @ repeat_heads(module, key).transpose(2, 3) * scaling + mask
    log_sum = scores.logsumexp(-1, keepdim=True)
    kept = torch.sigmoid(log_sum - module.sinks.view(1, -1, 1, 1))
    return (scores.softmax(-1) @ repeat_heads(module, value) * kept).transpose(1, 2), None


def without_sinks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: object
) -> tuple[Tensor, None]:
    output = functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


def without_the_sinks_gradient(
    module: nn.Module, *tensors: Tensor, **arguments: float | None
) -> tuple[Tensor, Tensor | None]:
    """Compute correct outputs, but no gradient of the sinks. Some fused kernels are reported to have this error."""
    blind = SimpleNamespace(
        sinks=module.sinks.detach(), num_key_value_groups=module.num_key_value_groups, training=module.training
    )
    return eager_attention_forward(blind, *tensors, **arguments)


def without_the_window(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **arguments: float | None
) -> tuple[Tensor, Tensor | None]:
    length = query.shape[2]
    causal = torch.full((length, length), torch.finfo(query.dtype).min).triu(1)
    return eager_attention_forward(module, query, key, value, causal.expand(query.shape[0], 1, -1, -1), **arguments)


def with_half_the_key_gradient(
    module: nn.Module, query: Tensor, key: Tensor, *rest: Tensor, **arguments: float | None
) -> tuple[Tensor, Tensor | None]:
    return eager_attention_forward(module, query, (key + key.detach()) / 2, *rest, **arguments)


def register(function: Attention) -> None:
    """Register a function in transformers under the name NAME. It gets the same masks as `eager`."""
    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def refusal(name: str, precision: Precision = Precision.fp32) -> str:
    with pytest.raises(UserError) as caught:
        attention_check.check(TrainConfig(attn_implementation=name, precision=precision), "qat")
    message = str(caught.value)
    assert message.startswith(f"qat.attn_implementation={name}: ") and "\n" not in message
    assert message.endswith("Use qat.attn_implementation=eager.")
    return message


@pytest.mark.parametrize("precision", Precision)
def test_the_errors_of_eager_are_the_errors_from_rounding(precision: Precision) -> None:
    errors, rounding = attention_check.measure_errors("eager", precision, CPU)
    assert max(errors.values()) == rounding
    assert 0 < rounding < (1e-5 if precision is Precision.fp32 else 0.1)


@pytest.mark.parametrize("precision", Precision)
def test_a_correct_kernel_passes_in_every_precision(precision: Precision, capsys: pytest.CaptureFixture[str]) -> None:
    register(online)
    attention_check.check(TrainConfig(attn_implementation=NAME, precision=precision), "sft")
    assert f"[sft] attn_implementation={NAME} agrees with eager" in capsys.readouterr().out


WRONG = {
    without_sinks: ("the gradient of sinks in a", 9),
    without_the_sinks_gradient: ("the gradient of sinks in a", 2),
    without_the_window: ("in a sliding-attention layer", 9),
    with_half_the_key_gradient: ("the gradient of k in a", 5),
}


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
@pytest.mark.parametrize(("wrong", "tensor", "count"), [(wrong, *rest) for wrong, rest in WRONG.items()])
def test_a_wrong_kernel_is_refused_in_the_finest_and_in_the_coarsest_precision(
    wrong: Attention, tensor: str, count: int, precision: Precision
) -> None:
    register(wrong)
    message = refusal(NAME, precision)
    assert tensor in message and "differs from eager by" in message
    if precision is Precision.fp32:
        assert f"{count} of 9 tensors differ too much" in message


def test_a_kernel_that_gives_nan_is_refused() -> None:
    register(lambda *tensors, **arguments: (eager_attention_forward(*tensors, **arguments)[0] * torch.nan, None))
    assert "differs from eager by nan" in refusal(NAME)


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "flash_attention_3", "nonsense", "no/such-kernel"])
def test_a_kernel_that_transformers_cannot_run_is_one_message(name: str) -> None:
    message = refusal(name)
    assert "transformers cannot train gpt-oss with this attention here (" in message
    assert len(message) < 500


def with_masks_of_its_own(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: object, **arguments: float | None
) -> tuple[Tensor, Tensor | None]:
    """Compute attention that is correct for padded batches, but does not separate packed documents."""
    ages = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])
    hidden = (ages < 0) | (ages >= (module.sliding_window or query.shape[2]))
    mask = torch.zeros(query.shape[0], 1, *ages.shape, dtype=query.dtype).masked_fill(
        hidden, torch.finfo(query.dtype).min
    )
    return eager_attention_forward(module, query, key, value, mask, **arguments)


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("name", ["eager", NAME])
def test_a_kernel_that_uses_its_masks_may_train_packed_documents(
    name: str, precision: Precision, capsys: pytest.CaptureFixture[str]
) -> None:
    register(online)
    attention_check.check(TrainConfig(attn_implementation=name, precision=precision, packing=True), "sft")
    said = capsys.readouterr().out
    assert f"attn_implementation={name} keeps packed documents apart, and agrees with eager" in said


def test_a_kernel_that_lets_packed_documents_see_each_other_is_refused_only_with_packing() -> None:
    register(with_masks_of_its_own)
    settings = TrainConfig(attn_implementation=NAME, precision=Precision.fp32)
    attention_check.check(settings, "sft")
    settings.packing = True
    with pytest.raises(UserError) as caught:
        attention_check.check(settings, "sft")
    assert "is wrong for packed documents, which must not see each other: " in str(caught.value)


def test_eager_is_refused_without_masks_made_from_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_check.packing_masks, "mask_documents", lambda model: None)
    with pytest.raises(UserError, match="packed documents"):
        attention_check.check(TrainConfig(packing=True, precision=Precision.fp32), "sft")


@pytest.mark.parametrize("precision", Precision)
def test_fused_sinks_passes_in_every_precision(precision: Precision, capsys: pytest.CaptureFixture[str]) -> None:
    """With packing, padded rows are checked too."""
    settings = TrainConfig(attn_implementation=FUSED_SINKS, precision=precision, packing=True)
    assert attention_check.check(settings, "sft") == FUSED_SINKS
    assert capsys.readouterr().out.count("agrees with eager") == 2


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `auto` choose as on a Hopper GPU. The check still runs on the CPU."""
    monkeypatch.setattr(attention, "capability", lambda: (9, 0))


def test_auto_is_eager_on_a_cpu_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert attention_check.check(TrainConfig(), "sft") == "eager"
    assert "[sft] attn_implementation=auto chooses eager" in capsys.readouterr().out


@pytest.mark.usefixtures("hopper")
def test_auto_checks_its_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert attention_check.check(TrainConfig(packing=True), "qat") == FUSED_SINKS
    said = capsys.readouterr().out
    assert said.count("agrees with eager") == 2
    assert f"[qat] attn_implementation=auto chooses {FUSED_SINKS}" in said


@pytest.mark.usefixtures("hopper")
def test_auto_does_not_choose_a_kernel_that_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """flex_attention is the next candidate, and does not run on CPUs."""

    def blind(module: nn.Module, *tensors: Tensor, **arguments: float | None) -> tuple[Tensor, Tensor | None]:
        return sink_attention.attend(SimpleNamespace(sinks=module.sinks.detach()), *tensors, **arguments)

    # Not `register`: after a forward pass with quantizers, ModelOpt leaves an entry here that hides registered kernels.
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, FUSED_SINKS, blind)
    # Otherwise transformers would compile the mask of flex_attention first, which takes seconds.
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda *, _compile, **rest: create_block_mask(**rest))
    assert attention_check.check(TrainConfig(), "sft") == "eager"
    warned = capsys.readouterr().err
    assert f"attn_implementation=auto does not choose {FUSED_SINKS}" in warned
    assert "the gradient of sinks in a" in warned
    assert "attn_implementation=auto does not choose flex_attention" in warned


def test_eager_is_not_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_check, "measure_errors", lambda *_, **options: pytest.fail("eager was compared"))
    attention_check.check(TrainConfig(attn_implementation="eager"), "sft")


def test_the_check_does_not_change_the_random_state_of_training() -> None:
    before = torch.random.get_rng_state()
    attention_check.measure_errors("eager", Precision.fp32, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)
