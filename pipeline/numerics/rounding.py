"""Chooses the scale of each block among the candidates of a rule.

Legend: L = leading dimension (experts), nb = blocks per row, block = values per block, lanes = output dimension.
"""

import torch
from torch import Tensor

from pipeline.numerics import kernels, scales
from pipeline.numerics.formats import ScaleType

_WEIGHT_BITS = 16
_FLOAT64_BIAS, _FLOAT64_SHIFT = 1023, 52


def choose_scales(
    values: Tensor, amax: Tensor, scale_type: ScaleType, rule: str, *, unit: Tensor | None, weights: Tensor | None
) -> Tensor:
    """Choose a scale for each block: (L, nb, block, lanes) -> (L, nb, lanes) uint8.

    Args:
        values: the values to round.
        amax: the largest magnitude of each block: shape (L, nb, lanes), float32.
        scale_type: type of the scales.
        rule: name of the rule that chooses the scales. SCALE_RULES[scale_type] lists the names.
        unit: tensor scales: shape (L), float32. None for e8m0.
        weights: weights of the squared errors, made by `error_weights`. None if all are 1.
    """
    chosen, *others = scales.candidates(amax, scale_type, rule, unit)
    for other in others:
        chosen = _better(values, chosen, other, scale_type=scale_type, unit=unit, weights=weights)
    return chosen


def error_weights(importance: Tensor, view: Tensor) -> Tensor:
    """Scale importance to whole numbers below 2^16. The result is float64.

    Shapes: (..., in) -> (L or 1, nb, block, 1). The largest weight of a block is at least 2^15. If all weights of a
    block are zero, they become 1. `view` holds the values to which the importance belongs, and has the shape
    (L, nb, block, lanes).
    """
    nb, size = view.shape[1:3]
    blocks = importance.float().reshape(-1, nb, size, 1).double()
    largest = blocks.amax(dim=2, keepdim=True)
    # The factor is made from bits. torch's ldexp calls pow, which a GPU does not round exactly.
    exponent = (_WEIGHT_BITS - torch.frexp(largest).exponent).long()
    factor = ((exponent + _FLOAT64_BIAS) << _FLOAT64_SHIFT).view(torch.float64)
    return torch.where(largest > 0, torch.floor(blocks * factor), 1.0)


def _better(
    values: Tensor, first: Tensor, second: Tensor, *, scale_type: ScaleType, unit: Tensor | None, weights: Tensor | None
) -> Tensor:
    """Choose the scale with the smaller squared error for each block. In a tie, choose the first."""
    one, two = (scales.divisor(each, scale_type, unit) for each in (first, second))
    error_one = kernels.squared_error(values, one.inverse, one.significand, weights)
    error_two = kernels.squared_error(values, two.inverse, two.significand, weights)
    ratio = scales.ratio(two.inverse, one.inverse)
    return torch.where(error_two < error_one * (ratio * ratio), second, first)
