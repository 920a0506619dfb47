"""Rounds base + delta of packed weights. On a GPU, compiled functions do this without storing base or sum.

Legend: E experts, nb = blocks per row, r = rank of the adapter.
"""

import torch
from torch import Tensor

from pipeline.numerics import low_rank, slabs, stacks
from pipeline.numerics.codec import decode, fake_quantize, note_bad
from pipeline.numerics.formats import BlockFormat


@torch.no_grad()
def round_packed(
    packed: tuple[Tensor, Tensor],
    factors: tuple[Tensor, Tensor, float],
    block_format: BlockFormat,
    importance: Tensor | None = None,
    *,
    dtype: torch.dtype,
    is_bad: Tensor | None = None,
) -> Tensor:
    """Decode weights, add the delta s A B of an adapter, and round the sum. There are no gradients.

    The bits are the same as after calls of `decode`, `low_rank.merge` and `fake_quantize`, in this order.

    Args:
        packed: MXFP4 blocks and their scales, both uint8. The blocks have the shape (E, out, nb, 16), and the scales
            have the shape (E, out, nb).
        factors: A with the shape (E, in, r), B with the shape (E, r, out), and the factor s.
        block_format: format to round to, a row of FORMATS, possibly with another scale rule.
        importance: see `fake_quantize`.
        dtype: type of the decoded weights, of the sum and of the result: float32 or bfloat16.
        is_bad: see `fake_quantize`.

    Returns:
        (E, in, out) of type `dtype`.

    Raises:
        CodecError: a sum is NaN or Inf, and there is no flag `is_bad`.
    """
    whole = None if importance is not None else _round_whole(packed, factors, block_format, dtype, is_bad)
    if whole is not None:
        return whole
    blocks, stored = packed
    a, b, scaling = factors
    count, out, nb, half = blocks.shape
    base = torch.empty(count, nb * half * 2, out, dtype=dtype, device=blocks.device)
    decode(blocks, stored, dtype, out=base.transpose(1, 2))
    merged = low_rank.merge(base, a, b, scaling)
    return fake_quantize(merged.transpose(1, 2), block_format, None, importance, is_bad=is_bad).transpose(1, 2)


def _round_whole(
    packed: tuple[Tensor, Tensor],
    factors: tuple[Tensor, Tensor, float],
    block_format: BlockFormat,
    dtype: torch.dtype,
    is_bad: Tensor | None,
) -> Tensor | None:
    """Round with compiled functions that never store base + delta.

    Return None if the weights are on a CPU, if compiling does not pay off, or if the rule has to compare two scales.
    Also return None if a sum is NaN or Inf and there is no flag: then the caller finds the bad block.
    """
    blocks, stored = packed
    a, b, scaling = factors
    kind, rule = block_format.scale_type, block_format.scale_rule
    if not slabs.works_whole(blocks) or rule == "mse":
        return None
    base = blocks, stored, *low_rank.align(a, b), scaling
    amax = stacks.merged_amax.run_compiled(*base, block_format.block_size, dtype)
    if amax is None:
        return None
    *divisor, is_bad_here = stacks.choose_divisor(amax, kind, rule)
    if not note_bad(is_bad_here, is_bad):
        return None
    return stacks.round_merged(*base, *divisor, dtype)
