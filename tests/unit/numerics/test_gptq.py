"""GPTQ agrees with the published algorithm, helps where inputs are correlated, and leaves weights on the grid.

Legend: E = experts, in = input dimension, out = output dimension.
"""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.numerics.codec import CodecError, decode, encode, fake_quantize, same_bits, tensor_scale
from pipeline.numerics.formats import E2M1_MAGNITUDES, MXFP4, NVFP4, SCALE_RULES, BlockFormat
from pipeline.numerics.gptq import HessianError, Hessians, round_gptq
from pipeline.numerics.stochastic import round_to_scales

RULES = {f"{row.name}-{rule}": row.with_rule(rule) for row in (MXFP4, NVFP4) for rule in SCALE_RULES[row.scale_type]}
EXPERTS, OUT = 3, 24
every_rule = pytest.mark.parametrize("block_format", RULES.values(), ids=RULES)
both_formats = pytest.mark.parametrize("block_format", [MXFP4, NVFP4], ids=["mxfp4", "nvfp4"])
both_orders = pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "in order"])


def random_weights(inputs: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Draw normal weights (E, out, in). Blocks of 16 differ in size."""
    generator = torch.Generator().manual_seed(inputs)
    sizes = torch.randint(-3, 1, (EXPERTS, OUT, inputs // 16, 1), generator=generator)
    weights = torch.randn(EXPERTS, OUT, inputs, generator=generator).unflatten(-1, (-1, 16))
    return (weights * torch.exp2(sizes.float())).flatten(-2).to(dtype)


def correlated_inputs(inputs: int) -> Tensor:
    """Draw inputs (E, tokens, in) that lie close to a space of few dimensions. Channels differ in size."""
    generator = torch.Generator().manual_seed(inputs + 1)
    common = torch.randn(EXPERTS, 4 * inputs, 8, generator=generator) @ torch.randn(
        EXPERTS, 8, inputs, generator=generator
    )
    sizes = torch.randn(inputs, generator=generator).exp()
    return (common + torch.randn(EXPERTS, 4 * inputs, inputs, generator=generator)) * sizes


def hessians_of(inputs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    exact = inputs.double()
    return (2 * exact.mT @ exact).to(dtype)


def output_errors(rounded: Tensor, weights: Tensor, inputs: Tensor) -> Tensor:
    """Return the mean squared error of the outputs of each expert, (E)."""
    return ((rounded.double() - weights.double()) @ inputs.double().mT).square().mean(dim=(1, 2))


def chosen_scales(weights: Tensor, block_format: BlockFormat) -> tuple[Tensor, Tensor | None]:
    unit = tensor_scale(weights, block_format)
    return encode(weights, block_format, unit)[1], unit


def scale_values(stored: Tensor, unit: Tensor | None) -> Tensor:
    if unit is None:
        return torch.exp2(stored.double() - 127)
    return stored.double() * unit.double().view(-1, 1, 1)


def nearest(values: Tensor, scale: Tensor) -> Tensor:
    """Round float64 values to the nearest of E2M1_MAGNITUDES times a scale. Ties go to the even code."""
    magnitudes = torch.tensor(E2M1_MAGNITUDES, dtype=torch.float64)
    distances = ((values.abs() / scale).unsqueeze(-1) - magnitudes).abs()
    low = distances.argmin(dim=-1)
    high = 7 - distances.flip(-1).argmin(dim=-1)
    codes = torch.where(low % 2 == 0, low, high)
    return torch.copysign(magnitudes[codes] * scale, values)


def published(weights: Tensor, hessian: Tensor, scale: Tensor, damping: float, act_order: bool) -> Tensor:
    """Run the algorithm of the paper (Frantar et al. 2022) column by column in float64.

    The weights are (out, in), the Hessian is (in, in), and `scale` has one value per weight. The factor is the upper
    Cholesky factor of the inverse, as in step 3 of the paper ("Cholesky reformulation").
    """
    columns = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(hessian))
    remaining, scale = weights.double()[:, columns], scale[:, columns]
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped[columns][:, columns]), upper=True)
    rounded = torch.empty_like(remaining)
    for i in range(len(columns)):
        rounded[:, i] = nearest(remaining[:, i], scale[:, i])
        error = (remaining[:, i] - rounded[:, i]) / factor[i, i]
        remaining[:, i:] -= error.unsqueeze(1) * factor[i, i:]
    result = torch.empty_like(rounded)
    result[:, columns] = rounded
    return result


def published_stack(
    weights: Tensor, hessians: Tensor, block_format: BlockFormat, damping: float, act_order: bool
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Return the reference, and the scales to which both round."""
    stored, unit = chosen_scales(weights, block_format)
    scale = scale_values(stored, unit).repeat_interleave(block_format.block_size, dim=-1)
    experts = [published(*expert, damping, act_order) for expert in zip(weights, hessians.double(), scale, strict=True)]
    return torch.stack(experts), {"stored": stored, "tensor_scale": unit}


@both_formats
@both_orders
@pytest.mark.parametrize("inputs", [32, 160])
def test_it_is_the_published_algorithm(block_format: BlockFormat, act_order: bool, inputs: int) -> None:
    weights, hessians = random_weights(inputs), hessians_of(correlated_inputs(inputs), torch.float64)
    expected, given = published_stack(weights, hessians, block_format, 0.02, act_order)
    found = round_gptq(weights, hessians, block_format, **given, damping=0.02, act_order=act_order)
    assert found.dtype == weights.dtype
    assert torch.equal(found.double(), expected)


@both_formats
@both_orders
def test_float32_hessians_give_almost_the_same_weights(block_format: BlockFormat, act_order: bool) -> None:
    weights, inputs = random_weights(160), correlated_inputs(160)
    hessians = hessians_of(inputs)
    expected, given = published_stack(weights, hessians, block_format, 0.01, act_order)
    found = round_gptq(weights, hessians, block_format, **given, act_order=act_order)
    assert (found.double() != expected).double().mean() < 0.02
    torch.testing.assert_close(
        output_errors(found, weights, inputs), output_errors(expected, weights, inputs), rtol=0.01, atol=0
    )


@every_rule
@both_orders
def test_the_output_is_closer_than_after_nearest_rounding(block_format: BlockFormat, act_order: bool) -> None:
    weights, inputs = random_weights(128), correlated_inputs(128)
    found = round_gptq(weights, hessians_of(inputs), block_format, act_order=act_order)
    plain = fake_quantize(weights, block_format)
    assert (output_errors(found, weights, inputs) < 0.3 * output_errors(plain, weights, inputs)).all()


@every_rule
@both_orders
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_uncorrelated_inputs_give_nearest_rounding(
    block_format: BlockFormat, act_order: bool, dtype: torch.dtype
) -> None:
    weights = random_weights(64, dtype)
    hessians = torch.diag_embed(torch.rand(EXPERTS, 64, generator=torch.Generator().manual_seed(0)))
    found = round_gptq(weights, hessians, block_format, act_order=act_order)
    assert same_bits(found, fake_quantize(weights, block_format))
    assert same_bits(found, round_to_scales(weights, block_format, *chosen_scales(weights, block_format)).values)


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_again_changes_nothing(block_format: BlockFormat, dtype: torch.dtype) -> None:
    weights = random_weights(96, dtype)
    found = round_gptq(weights, hessians_of(correlated_inputs(96)), block_format)
    assert not torch.equal(found, fake_quantize(weights, block_format))
    assert same_bits(fake_quantize(found, block_format), found)
    unit = tensor_scale(found, block_format)
    assert same_bits(decode(*encode(found, block_format, unit), dtype, unit), found)


@pytest.mark.parametrize("base_rule", ["ceil", "floor"])
@pytest.mark.parametrize("rule", ["ceil", "floor", "mse"])
def test_weights_on_the_scales_of_the_base_stay_under_every_rule(base_rule: str, rule: str) -> None:
    """The base's scales need not be the scales that a rule would choose for the fine-tuned weights."""
    base, inputs = random_weights(96), correlated_inputs(96)
    stored, _ = chosen_scales(base, MXFP4.with_rule(base_rule))
    moved = base + 0.1 * base.flip(0)
    found = round_gptq(moved, hessians_of(inputs), MXFP4, stored=stored)
    assert same_bits(found, round_to_scales(found, MXFP4, stored).values)
    assert same_bits(found, fake_quantize(found, MXFP4.with_rule(rule)))


def test_given_scales_of_nvfp4_stay_under_the_rule_mse() -> None:
    weights, rule = random_weights(96), NVFP4.with_rule("mse")
    stored, unit = chosen_scales(weights, NVFP4)
    found = round_gptq(
        weights, hessians_of(correlated_inputs(96)), NVFP4, stored=stored, tensor_scale=unit, act_order=False
    )
    assert same_bits(fake_quantize(found, rule), found)


@every_rule
def test_weights_on_the_grid_keep_their_bits(block_format: BlockFormat) -> None:
    weights = random_weights(96)
    weights[:, ::3, ::5] = -0.0
    weights[:, 1::3, ::5] = 0.0
    on_grid = fake_quantize(weights, block_format)
    assert same_bits(round_gptq(on_grid, hessians_of(correlated_inputs(96)), block_format), on_grid)


@both_formats
@both_orders
def test_chunks_of_experts_do_not_change_a_bit(block_format: BlockFormat, act_order: bool) -> None:
    weights, hessians = random_weights(64), hessians_of(correlated_inputs(64))

    def found(part: slice, at_once: int | None = None) -> Tensor:
        return round_gptq(weights[part], hessians[part], block_format, act_order=act_order, experts_at_once=at_once)

    alone = torch.cat([found(slice(i, i + 1)) for i in range(EXPERTS)])
    for at_once in (None, 1, 2):
        assert same_bits(found(slice(None), at_once), alone)


class Waits(TorchDispatchMode):
    """Counts the operations that make the CPU wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = function._schema.name
        self.count += name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
        return function(*arguments, **(keywords or {}))


@both_formats
@both_orders
def test_the_sweep_does_not_wait_for_the_device(block_format: BlockFormat, act_order: bool) -> None:
    """The number of waits is the same for one column block and for three."""

    def waits(inputs: int) -> int:
        weights, hessians = random_weights(inputs), hessians_of(correlated_inputs(inputs))
        with Waits() as found:
            round_gptq(weights, hessians, block_format, act_order=act_order)
        return found.count

    assert 0 < waits(32) == waits(96)


@both_formats
def test_the_memory_order_of_the_weights_does_not_matter(block_format: BlockFormat) -> None:
    weights, hessians = random_weights(96), hessians_of(correlated_inputs(96))
    stored_as_in_bf16_checkpoints = weights.mT.contiguous().mT
    found = round_gptq(stored_as_in_bf16_checkpoints, hessians, block_format)
    assert found.stride() == stored_as_in_bf16_checkpoints.stride()
    assert same_bits(found, round_gptq(weights, hessians, block_format))


def test_importance_weights_the_choice_of_scales() -> None:
    weights, rule = random_weights(96), MXFP4.with_rule("mse")
    importance = torch.rand(EXPERTS, 96, generator=torch.Generator().manual_seed(0)).pow(8)
    diagonal = torch.ones(EXPERTS, 96).diag_embed()
    for each in (importance, importance[0]):
        found = round_gptq(weights, diagonal, rule, importance=each)
        assert same_bits(found, fake_quantize(weights, rule, importance=each))
        assert not same_bits(found, fake_quantize(weights, rule))


def test_an_input_that_is_always_zero_is_rounded_to_nearest() -> None:
    weights, inputs = random_weights(96), correlated_inputs(96)
    inputs[..., 40] = 0
    found = round_gptq(weights, hessians_of(inputs), MXFP4)
    assert torch.equal(found[..., 40], fake_quantize(weights, MXFP4)[..., 40])


def test_the_factor_of_the_hessians_does_not_matter() -> None:
    weights, hessians = random_weights(96), hessians_of(correlated_inputs(96))
    assert same_bits(round_gptq(weights, hessians, MXFP4), round_gptq(weights, hessians * 2**-12, MXFP4))


def test_an_empty_stack_stays_empty() -> None:
    assert round_gptq(torch.empty(0, 8, 32), torch.empty(0, 32, 32), MXFP4).shape == (0, 8, 32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_hessian_that_is_not_finite_names_its_expert(bad: float, at_once: int) -> None:
    hessians = hessians_of(correlated_inputs(96))
    hessians[2, 5, 7] = bad
    with pytest.raises(HessianError, match="the Hessian of expert 2 has NaN or Inf") as caught:
        round_gptq(random_weights(96), hessians, MXFP4, experts_at_once=at_once)
    assert caught.value.expert == 2


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_hessian_that_is_not_positive_definite_names_its_expert(at_once: int) -> None:
    hessians = hessians_of(correlated_inputs(96))
    hessians[1] -= 0.1 * hessians[1].diagonal().max() * torch.eye(96)
    with pytest.raises(HessianError, match="expert 1 is not positive definite with a damping of") as caught:
        round_gptq(random_weights(96), hessians, MXFP4, damping=0.001, experts_at_once=at_once)
    assert caught.value.expert == 1


def test_damping_makes_the_hessian_of_few_tokens_positive_definite() -> None:
    weights, few = random_weights(96), correlated_inputs(96)[:, :10]
    with pytest.raises(HessianError, match="expert 0 is not positive definite"):
        round_gptq(weights, hessians_of(few), MXFP4, damping=0.0)
    found, plain = round_gptq(weights, hessians_of(few), MXFP4), fake_quantize(weights, MXFP4)
    assert (output_errors(found, weights, few) < output_errors(plain, weights, few)).all()


def test_a_weight_that_is_not_finite_names_its_expert() -> None:
    weights, hessians = random_weights(96), hessians_of(correlated_inputs(96))
    weights[1, 3, 50] = float("nan")
    for stored in (None, chosen_scales(random_weights(96), MXFP4)[0]):
        with pytest.raises(CodecError, match="weights of expert 1"):
            round_gptq(weights, hessians, MXFP4, stored=stored)


def test_arguments_that_do_not_fit_are_errors() -> None:
    weights, hessians = random_weights(96), hessians_of(correlated_inputs(96))
    stored, unit = chosen_scales(weights, NVFP4)
    mx_stored = chosen_scales(weights, MXFP4)[0]
    with pytest.raises(ValueError, match=r"need float32 or float64 Hessians \(3, 96, 96\)"):
        round_gptq(weights, hessians[:2], MXFP4)
    with pytest.raises(ValueError, match=r"not torch\.bfloat16"):
        round_gptq(weights, hessians.bfloat16(), MXFP4)
    with pytest.raises(CodecError, match="not a multiple of the block size"):
        round_gptq(weights[..., :80], hessians[:, :80, :80], MXFP4)
    with pytest.raises(ValueError, match="do not fit scales"):
        round_gptq(weights, hessians, MXFP4, stored=mx_stored[:, :, :2])
    with pytest.raises(ValueError, match="nvfp4 needs a tensor scale"):
        round_gptq(weights, hessians, NVFP4, stored=stored)
    with pytest.raises(ValueError, match="mxfp4 takes no tensor scale"):
        round_gptq(weights, hessians, MXFP4, stored=mx_stored, tensor_scale=unit)
    with pytest.raises(ValueError, match="bytes from 0 to 252"):
        round_gptq(weights, hessians, MXFP4, stored=torch.full_like(mx_stored, 255))


def test_hessians_are_means_over_the_tokens_of_each_expert() -> None:
    hessians, inputs = Hessians(2, 32), correlated_inputs(32)[0]
    for batch in (inputs[:5], inputs[5:5], inputs[5:77], inputs[77:]):
        hessians.add(1, batch)
    exact = inputs.double()
    assert hessians.tokens == [0, len(inputs)]
    torch.testing.assert_close(hessians.means[1].double(), exact.mT @ exact / len(inputs), rtol=1e-5, atol=1e-5)
    assert not hessians.means[0].any()


def test_means_do_not_lose_tokens_that_come_late() -> None:
    """A float32 sum of 2^24 would lose the ones that come later."""
    hessians = Hessians(1, 32)
    hessians.tokens = [1 << 26]
    hessians.means += 1
    for _ in range(64):
        hessians.add(0, torch.full((1 << 14, 32), 2.0))
    ones, late = 1 << 26, 1 << 20
    expected = Fraction(ones + 4 * late, ones + late)
    assert hessians.means[0, 3, 4].item() == pytest.approx(float(expected), rel=2e-6)


def test_experts_with_too_few_tokens_are_listed() -> None:
    hessians = Hessians(4, 32)
    for expert, count in enumerate((0, 63, 64, 65)):
        hessians.add(expert, torch.ones(count, 32, dtype=torch.bfloat16))
    assert hessians.with_too_few_tokens(per_input=2) == [0, 1]
    assert hessians.with_too_few_tokens(per_input=0) == []


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_codec_and_given_scales_have_one_rounding(block_format: BlockFormat, dtype: torch.dtype) -> None:
    weights = random_weights(96, dtype)
    found = round_to_scales(weights, block_format, *chosen_scales(weights, block_format)).values
    assert same_bits(found, fake_quantize(weights, block_format))


def test_rounding_to_given_scales_saturates() -> None:
    row = torch.tensor([100.0, -100.0, 5.0, 2.5, -0.1, 0.0] + [0.0] * 26)
    found = round_to_scales(row.view(1, 1, -1), MXFP4, torch.tensor([[[127]]], dtype=torch.uint8)).values
    assert found[0, 0, :6].tolist() == [6.0, -6.0, 4.0, 2.0, -0.0, 0.0]


def modelopts(weights: Tensor, hessian: Tensor, scale: Tensor, damping: float, act_order: bool) -> Tensor:
    """Run ModelOpt's GPTQ in float64 for one expert. `scale` has one value per weight, (out, in).

    ModelOpt has no `act_order`, so the columns are sorted before. Its MXFP4 quantizer would choose the
    scales again, so it is given the rounding to the nearest value.
    """
    from modelopt.torch.quantization.utils.calib_utils import compute_hessian_inverse, gptq_blockwise_update

    columns = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(hessian))
    rounded, scale = weights.double()[:, columns], scale[:, columns]
    factor = compute_hessian_inverse(hessian[columns][:, columns], rounded, damping)
    gptq_blockwise_update(rounded, factor, 32, lambda values: nearest(values, scale))
    result = torch.empty_like(rounded)
    result[:, columns] = rounded
    return result


@both_formats
@both_orders
def test_it_gives_the_weights_of_modelopts_gptq(block_format: BlockFormat, act_order: bool) -> None:
    weights, hessians = random_weights(96), hessians_of(correlated_inputs(96), torch.float64)
    stored, unit = chosen_scales(weights, block_format)
    scale = scale_values(stored, unit).repeat_interleave(block_format.block_size, dim=-1)
    found = round_gptq(
        weights, hessians, block_format, stored=stored, tensor_scale=unit, damping=0.02, act_order=act_order
    )
    for rounded, *expert in zip(found, weights, hessians, scale, strict=True):
        assert torch.equal(rounded.double(), modelopts(*expert, 0.02, act_order))


def test_hessians_are_half_of_modelopts() -> None:
    from modelopt.torch.quantization.utils.calib_utils import update_hessian

    hessians, theirs, count = Hessians(1, 96), torch.zeros(96, 96), 0
    for batch in correlated_inputs(96)[0].split(100):
        hessians.add(0, batch)
        theirs, count = update_hessian(batch, theirs, count)
    assert hessians.tokens == [count]
    torch.testing.assert_close(2 * hessians.means[0], theirs, rtol=1e-5, atol=1e-5 * theirs.max().item())
