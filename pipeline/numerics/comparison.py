"""Compares weights for reports: errors of rounding, weights that training changed, and blocks that differ.

Legend: E experts, in = input dimension, out = output dimension, nb = blocks per row.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.numerics import kernels
from pipeline.numerics.formats import BlockFormat


def differences(stacks: Sequence[Tensor]) -> Tensor:
    """Sum the squared errors of rounding, and count the weights that training changed.

    Args:
        stacks: values, rounded values, base values and rounded base values. Each is (E, rows, columns).

    Returns:
        A float64 tensor with four numbers:
        1. the sum of squared rounding errors;
        2. the sum of squared values;
        3. the number of values that differ from the base;
        4. the number of rounded values that differ from the rounded base.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=stacks[0].device)
    for matrices in zip(*stacks, strict=True):
        sums += kernels.row_differences(*matrices).double().sum(dim=1)
    return sums


def changes(stacks: Sequence[Tensor]) -> Tensor:
    """Sum as `differences` does, and compare the change by training with the change that rounding leaves.

    Args:
        stacks: see `differences`.

    Returns:
        A float64 tensor with eight numbers. The first four are those of `differences`. With d = values - base and
        r = rounded values - base, the others are the sums of d^2, r * d, r^2 and base^2.
    """
    sums = torch.zeros(8, dtype=torch.float64, device=stacks[0].device)
    for matrices in zip(*stacks, strict=True):
        sums += kernels.row_changes(*matrices).double().sum(dim=1)
    return sums


def count_clipped(values: Tensor, scales: Tensor, block_format: BlockFormat) -> Tensor:
    """Count the values beyond 6 * scale. The result is int64, with the shape ().

    Args:
        values: weights, (E, in, out).
        scales: scales of the blocks, (E, out, nb) float32.
        block_format: the format.
    """
    blocks = values.unflatten(1, (-1, block_format.block_size))
    count = torch.zeros((), dtype=torch.int64, device=values.device)
    for matrix, scale in zip(blocks.split(1), scales.transpose(1, 2).split(1), strict=True):
        count += kernels.count_clipped(matrix, scale).long().sum()
    return count


def sum_of_squares(values: Tensor) -> float:
    """Sum the squares of (E, rows, columns) values, in the same way as `differences`."""
    return sum(float(kernels.row_squares(matrix).double().sum()) for matrix in values)


def unequal_blocks(one: Tensor, other: Tensor, block_format: BlockFormat) -> Tensor:
    """Mark the blocks in which two tensors differ. Signs of zeros are ignored.

    The tensors have the shape (E, in, out). The result has the shape (E, out, nb) and the type bool.
    """
    blocks = [values.unflatten(1, (-1, block_format.block_size)) for values in (one, other)]
    experts, nb, _, lanes = blocks[0].shape
    found = torch.empty((experts, nb, lanes), dtype=torch.bool, device=one.device)
    for into, *pair in zip(found, *blocks, strict=True):
        into.copy_(kernels.count_unequal(*pair) > 0)
    return found.transpose(1, 2)


def add_up(names: Iterable[str], parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add up the named sums of several stacks of experts."""
    stacks = list(parts)
    return {name: sum((stack[name] for stack in stacks), 0.0) for name in names}


def share(part: float, whole: float) -> float:
    """Return part / whole, or 0 if there is nothing to compare."""
    return part / whole if whole else 0.0
