"""Rounds some experts of a stack: chooses their scales, rounds to them, and checks that the result stays.

Legend: E = experts, in = input dimension, out = output dimension, nb = blocks per row.
"""

from dataclasses import dataclass

from torch import Tensor

from pipeline.errors import CheckFailed
from pipeline.export.account import Scales
from pipeline.numerics.codec import choose_scales, fake_quantize, same_bits, tensor_scale
from pipeline.numerics.comparison import unequal_blocks
from pipeline.numerics.convert import mxfp4_to_nvfp4
from pipeline.numerics.formats import E8M0_LARGEST, MXFP4, BlockFormat
from pipeline.numerics.stochastic import Noise, round_to_scales

_MOST_ROUNDS = 16


@dataclass(frozen=True)
class RoundedExperts:
    """Rounded weights of some experts.

    Attributes:
        blocks: packed codes, as in `codec.encode`.
        scales: scales of the blocks, and tensor scales.
        values: decoded values, (E, in, out).
        clipped: number of weights beyond the largest value of their block.
    """

    blocks: Tensor
    scales: Scales
    values: Tensor
    clipped: int


def own_scales(packed: tuple[Tensor, ...], block_format: BlockFormat, device: str) -> Scales:
    """Return the own scales of packed MXFP4 experts (blocks and scales), in a format of FORMATS."""
    blocks, scales = (each.to(device) for each in packed)
    if block_format.stores_like(MXFP4):
        return scales.clamp(max=E8M0_LARGEST), None  # a larger scale is never written, and no weight needs it
    converted = mxfp4_to_nvfp4(blocks, scales)
    return converted.scales, converted.tensor_scale


def scales_by_rule(values: Tensor, block_format: BlockFormat, rule: str, importance: Tensor | None) -> Scales:
    """Choose scales for weights (E, in, out). The tensor scale is the format's own, whatever the rule."""
    turned = values.transpose(1, 2)
    unit = tensor_scale(turned, block_format)
    importance = None if importance is None else importance.to(values.device)
    return choose_scales(turned, block_format.with_rule(rule), unit, importance), unit


def round_experts(
    values: Tensor, block_format: BlockFormat, scales: Scales, noise: Noise | None = None, first: int = 0
) -> RoundedExperts:
    """Round weights (E, in, out) to given scales: stochastically, or without noise to the nearest value.

    `first` is the index of the first expert in its stack. The random bits depend on it.
    """
    made = round_to_scales(values.transpose(1, 2), block_format, *scales, noise=noise, first=first)
    return RoundedExperts(made.blocks, scales, made.values.transpose(1, 2), made.clipped)


def settle(values: Tensor, block_format: BlockFormat, name: str) -> tuple[Tensor, int]:
    """Round (E, in, out) values by the format's rule until they stay. Return them, and the number of changed blocks.

    Raises:
        CheckFailed: the values still change after many rounds.
    """
    adjusted = 0
    for _ in range(_MOST_ROUNDS):
        again = fake_quantize(values.transpose(1, 2), block_format).transpose(1, 2)
        if same_bits(again, values):
            return values, adjusted
        adjusted += int(unequal_blocks(again, values, block_format).sum())
        values = again
    raise CheckFailed(
        f"{name}: {block_format.name} with scale_rule={block_format.scale_rule} does not keep the rounded weights"
    )
