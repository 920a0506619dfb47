"""Rounds values to the grids of given scales. Every method that rounds to scales it did not choose here uses this.

Legend: in = input dimension, out = output dimension, nb = blocks per row = in / block_size.
"""

import torch
from torch import Tensor

from pipeline.numerics import kernels, scales, slabs
from pipeline.numerics.formats import BlockFormat


@torch.no_grad()
def round_to_scales(
    values: Tensor, block_format: BlockFormat, stored: Tensor, tensor_scale: Tensor | None = None
) -> Tensor:
    """Round each value to the nearest value of its block. Ties go to the even code, as in `codec.encode`.

    Values beyond 6 * scale saturate. NaN gives an undefined value, so the caller checks its values.

    Args:
        values: shape (..., out, in), float32 or bfloat16, any strides.
        block_format: format of the result. Its scale rule is not used.
        stored: stored scales as `codec.encode` returns them, shape (..., out, nb). e8m0 bytes are at most 252.
        tensor_scale: result of `codec.tensor_scale`. None for a format without a tensor scale.

    Returns:
        The rounded values. They have the shape, type and memory order of `values`.
    """
    view = slabs.as_blocks(slabs.as_matrices(values), block_format.block_size)
    count, nb, _, lanes = view.shape
    lanes_last = stored.view(torch.uint8).reshape(count, lanes, nb).transpose(1, 2)
    unit = None if tensor_scale is None else tensor_scale.reshape(-1)
    result = torch.empty_like(slabs.as_matrices(values))
    into = slabs.as_blocks(result, block_format.block_size)
    for slab in slabs.split(view):
        part, of_slab = slabs.take(view, slab), None if unit is None else unit[slab[0]]
        found = scales.divisor(lanes_last[slab].contiguous(), block_format.scale_type, of_slab)
        slabs.put(into, slab, kernels.round_blocks(part, found.inverse, found.significand, found.scale))
    return result.view(values.shape)
