"""Stochastic rounding: its mean, its fixed points, and bits that depend on nothing but seed, stack and place."""

import pytest
import torch
from tensor_bits import E2M1_VALUES
from torch import Tensor

from pipeline.numerics import slabs
from pipeline.numerics.codec import CodecError, decode, encode, fake_quantize, same_bits, tensor_scale
from pipeline.numerics.formats import E2M1_MAGNITUDES, FORMATS, MXFP4, NVFP4, SCALE_RULES, BlockFormat
from pipeline.numerics.stochastic import Noise, Rounded, round_to_scales

NOISE = Noise.of(42, "model.layers.0.mlp.experts.gate_up_proj")
ONE = {"mxfp4": torch.tensor(127, dtype=torch.uint8), "nvfp4": torch.tensor(1.0).to(torch.float8_e4m3fn)}
"""The stored scale whose value is 1."""
ROWS = [MXFP4, NVFP4]
NAMES = [row.name for row in ROWS]
RULES = {f"{name}-{rule}": row.with_rule(rule) for name, row in FORMATS.items() for rule in SCALE_RULES[row.scale_type]}


def weights(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Make weights (3, 40, 96). Their sizes differ between rows."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(3, 40, 96, generator=generator) * torch.linspace(-6, 0, 40).exp2()[:, None]).to(dtype)


def scaled(values: Tensor, block_format: BlockFormat) -> tuple[Tensor, Tensor | None]:
    """Return the scales and tensor scales that the format's rule chooses."""
    unit = tensor_scale(values, block_format)
    return encode(values, block_format, unit)[1], unit


def draw(values: Tensor, block_format: BlockFormat, noise: Noise | None = NOISE) -> Rounded:
    scales, unit = scaled(values, block_format)
    return round_to_scales(values, block_format, scales, unit, noise=noise)


def with_scale_one(values: Tensor, block_format: BlockFormat, noise: Noise = NOISE) -> Tensor:
    """Round (E, out, in) values with scales of 1."""
    nb = values.shape[-1] // block_format.block_size
    scales = ONE[block_format.name].expand(*values.shape[:-1], nb).contiguous()
    unit = torch.ones(len(values)) if block_format is NVFP4 else None
    return round_to_scales(values, block_format, scales, unit, noise=noise).values


@pytest.mark.parametrize("value", [0.01, 0.2, 0.5625, 0.99, 1.2, 1.75, 2.1, 3.9, 4.02, 5.5, -0.3, -2.75, -5.9])
def test_the_mean_of_half_a_million_draws_is_the_value_within_four_standard_errors(value: float) -> None:
    """The block size does not matter: another test shows that it changes no bit."""
    values = torch.full((1, 683, 768), value)
    found = with_scale_one(values, MXFP4)
    lower = max(m for m in E2M1_MAGNITUDES if m <= abs(value))
    upper = E2M1_MAGNITUDES[E2M1_MAGNITUDES.index(lower) + 1]
    assert set(found.abs().unique().tolist()) == {lower, upper}
    share = (abs(values[0, 0, 0].item()) - lower) / (upper - lower)
    error = (upper - lower) * (share * (1 - share) / values.numel()) ** 0.5
    assert abs(found.double().mean() - values.double()[0, 0, 0]) < 4 * error


def test_the_mean_over_seeds_is_the_weight_in_steps_of_its_block() -> None:
    values = weights(torch.float32)
    never_clips = NVFP4.with_rule("ceil")
    draws = torch.stack([draw(values, never_clips, Noise.of(seed, "stack")).values for seed in range(200)])
    steps = draws.amax(0) - draws.amin(0)
    assert (steps > 0).float().mean() > 0.95
    error = ((draws.double().mean(0) - values) / steps)[steps > 0]
    assert abs(error.mean()) < 4 * error.std() / error.numel() ** 0.5
    assert error.std() < 0.5 / 200**0.5 * 1.05


@pytest.mark.parametrize("block_format", ROWS, ids=NAMES)
def test_neighbouring_draws_are_independent(block_format: BlockFormat) -> None:
    values = torch.full((4, 256, 256), 0.25)
    ups = (with_scale_one(values, block_format) > 0).double() - 0.5
    for dim in range(3):
        product = (ups * ups.roll(1, dim)).mean() * 4
        assert abs(product) < 4 / values.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block_format", ROWS, ids=NAMES)
def test_values_of_the_format_stay_what_they_are(block_format: BlockFormat, dtype: torch.dtype) -> None:
    codes = torch.tensor(E2M1_VALUES, dtype=dtype).repeat(4)
    powers = torch.arange(-6.0, 7.0).exp2()
    values = (codes * powers[:, None]).to(dtype).repeat(2, 1, 1)
    for seed in range(8):
        found = draw(values, block_format, Noise.of(seed, "x"))
        assert same_bits(found.values, values) and found.clipped == 0


@pytest.mark.parametrize("block_format", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_each_weight_becomes_one_of_its_two_neighbours(block_format: BlockFormat, dtype: torch.dtype) -> None:
    values = weights(dtype)
    scales, unit = scaled(values, block_format)
    found = round_to_scales(values, block_format, scales, unit, noise=NOISE)
    step = decode(torch.full_like(found.blocks, 0x22), scales, torch.float64, unit)
    position, below = values.double().abs() / step, found.values.double().abs() / step
    grid = torch.tensor(E2M1_MAGNITUDES, dtype=torch.float64)
    index = (torch.bucketize(position, grid, right=True) - 1).clamp(max=7)
    lower, upper = grid[index], grid[(index + 1).clamp(max=7)]
    is_beyond = position > 6
    assert ((below == lower) | (below == upper)).all()
    assert found.clipped == is_beyond.sum() and (below[is_beyond] == 6).all()
    assert torch.equal(found.values.signbit(), values.signbit())
    assert same_bits(decode(found.blocks, scales, dtype, unit), found.values)


@pytest.mark.parametrize("block_format", RULES.values(), ids=RULES)
def test_without_noise_the_result_is_that_of_the_codec(block_format: BlockFormat) -> None:
    values = weights()
    unit = tensor_scale(values, block_format)
    blocks, scales = encode(values, block_format, unit)
    found = round_to_scales(values, block_format, scales, unit)
    assert torch.equal(found.blocks, blocks)
    assert same_bits(found.values, fake_quantize(values, block_format))


@pytest.mark.parametrize("block_format", ROWS, ids=NAMES)
def test_the_bits_do_not_depend_on_how_the_stack_is_split(
    block_format: BlockFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = weights()
    scales, unit = scaled(values, block_format)
    whole = round_to_scales(values, block_format, scales, unit, noise=NOISE)
    for part in (slice(0, 1), slice(1, 3)):
        of_part = None if unit is None else unit[part]
        found = round_to_scales(values[part], block_format, scales[part], of_part, noise=NOISE, first=part.start)
        assert same_bits(found.values, whole.values[part]) and torch.equal(found.blocks, whole.blocks[part])
    monkeypatch.setitem(slabs.VALUES, "cpu", 640)
    monkeypatch.setitem(slabs.LANES, "cpu", 8)
    for turned in (values, values.transpose(1, 2).contiguous().transpose(1, 2)):
        found = round_to_scales(turned, block_format, scales, unit, noise=NOISE)
        assert same_bits(found.values, whole.values) and torch.equal(found.blocks, whole.blocks)


def test_the_bits_do_not_depend_on_the_block_size() -> None:
    values = weights().clamp(-6, 6)
    assert same_bits(with_scale_one(values, MXFP4), with_scale_one(values, NVFP4))


def test_seed_and_name_change_the_bits() -> None:
    values = weights()
    noises = [Noise.of(1, "a"), Noise.of(2, "a"), Noise.of(1, "b")]
    first, *others = (draw(values, MXFP4, noise).values for noise in noises)
    assert all((each != first).float().mean() > 0.1 for each in others)
    assert same_bits(first, draw(values, MXFP4, Noise.of(1, "a")).values)


def test_values_beyond_the_largest_code_saturate_and_are_counted() -> None:
    values = torch.tensor([[[6.0, 6.25, -7.0, 1e30, *[0.0] * 28]]])
    scales = torch.full((1, 1, 1), 127, dtype=torch.uint8)
    found = round_to_scales(values, MXFP4, scales, noise=NOISE)
    assert found.values[0, 0, :4].tolist() == [6.0, 6.0, -6.0, 6.0]
    assert found.clipped == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("block_format", ROWS, ids=NAMES)
def test_nan_and_inf_raise_an_error_that_names_the_block(block_format: BlockFormat, bad: float) -> None:
    values = weights()
    scales, unit = scaled(values, block_format)
    values[1, 7, 70] = bad
    with pytest.raises(CodecError) as caught:
        round_to_scales(values, block_format, scales, unit, noise=NOISE)
    assert caught.value.block == (1, 7, 70 // block_format.block_size)


@pytest.mark.parametrize("rule", ["ceil", "floor", "mse"])
def test_every_rule_of_mxfp4_keeps_every_block_of_the_format(rule: str) -> None:
    """Largest code and scale decide what a rule does. Test all of them, with all smaller codes in the block."""
    magnitudes = torch.tensor(E2M1_MAGNITUDES)
    blocks = torch.stack([torch.where(magnitudes <= largest, magnitudes, 0.0).repeat(4) for largest in magnitudes])
    blocks[:, 1::2] *= -1
    powers = torch.arange(-127.0, 126.0).exp2()
    values = blocks * powers[:, None, None]
    for dtype in (torch.float32, torch.bfloat16):
        on_grid = values.to(dtype)
        assert same_bits(fake_quantize(on_grid, MXFP4.with_rule(rule)), on_grid)


def test_mse_keeps_every_block_of_nvfp4_whose_scale_is_not_among_the_smallest() -> None:
    """The rule finds the scale again, as long as e4m3 holds an eighth of it."""
    magnitudes = torch.tensor(E2M1_MAGNITUDES)
    blocks = torch.stack([torch.where(magnitudes <= largest, magnitudes, 0.0).repeat(2) for largest in magnitudes])
    stored = torch.arange(32, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = (blocks * stored[:, None, None]).flatten(0, 1)
    anchor = torch.full((1, 16), 6 * 256.0)  # fixes the tensor scale at 1
    for rows in values.split(8):
        if rows.abs().max() <= 4 * 448:
            on_grid = torch.cat([anchor, rows])
            assert same_bits(fake_quantize(on_grid, NVFP4.with_rule("mse")), on_grid)
