"""The codec encodes values as codes and scales, and decodes them. Training (fake quantization) and export call it.

A block of values along the input dimension shares a scale. Each value is divided by the scale and rounded to the
nearest of the 16 values of e2m1, ties to even (OCP MX v1.0, 5.3.3 and 6.3). The rule for the scale can be chosen (see
`formats.SCALE_RULES`).

All steps are exact, so every device gives the same bits, compiled or not. The module `scales` computes scales from the
bits of the largest magnitude. The module `kernels` divides by powers of two and decides ties by comparison.

Training and export must share one definition. ModelOpt's training kernel rounds ties to even, but its exporter rounds
them toward zero, so 0.4 % of its exported BF16 weights differ from the trained ones.

Edge cases:
- Zeros, and values that round to zero, keep their sign.
- Subnormal values are rounded like others, with the smallest scale, 2^-127. (NVFP4: they become zero, because the
  tensor scale is at least 2^-110.)
- Values beyond 6 * scale saturate. This happens under `floor`, `nearest` and `mse`, and if the caller passes a tensor
  scale. Magnitudes from 3.5 * 2^126 (NVFP4: from 2^127) always saturate, because the next value, 2^128, would be Inf.
- A block with NaN or Inf raises an error instead of becoming zeros.

Values have the logical shape (..., out, in), with blocks along `in`. They may have any strides: an (E, in, out)
parameter can be passed as `parameter.transpose(-1, -2)` without a copy. The work is split into slabs, so temporaries
stay small.

Legend: in = input dimension, out = output dimension, nb = blocks per row = in / block_size, L = all leading dimensions.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.numerics import kernels, scales
from pipeline.numerics.formats import BlockFormat, ScaleType
from pipeline.numerics.scales import Divisor

Slab = tuple[slice, slice, slice]
"""Index ranges: experts, blocks of a row, and lanes."""

_SLAB_VALUES = {"cpu": 1 << 22, "cuda": 1 << 27}
_SLAB_LANES = 1 << 12
_WEIGHT_BITS = 16
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
_WORD = torch.int64


class CodecError(ValueError):
    """The values cannot be represented in the format. `block` is the index of the first bad block, or None."""

    def __init__(self, message: str, block: tuple[int, ...] | None = None) -> None:
        super().__init__(message)
        self.block = block


def encode(
    values: Tensor,
    block_format: BlockFormat,
    tensor_scale: Tensor | None = None,
    importance: Tensor | None = None,
    *,
    rounded: Tensor | None = None,
    saturated: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize values to codes and scales, and pack the codes.

    Args:
        values: (..., in) or (..., out, in) float32 or bfloat16 with any strides. Blocks run along the last dimension.
        block_format: format of the result: a row of FORMATS, possibly with another scale rule.
        tensor_scale: (...) float32 from the function `tensor_scale`. None for a format without a tensor scale.
        importance: weights of the squared error under the rule `mse`, (in) or (..., in) float32, at least 0. With
            None, all inputs have the same weight.
        rounded: output tensor for the decoded result, or None. It has the shape and type of `values`, and any strides.
        saturated: output tensor that marks the blocks whose largest magnitude exceeds 6 * scale, or None. It is
            (..., nb) bool, contiguous.

    Returns:
        blocks: (..., nb, block_size / 2) uint8, two codes a byte, the even element in the low nibble; contiguous.
        scales: (..., nb) uint8 (e8m0) or float8_e4m3fn; contiguous.

    Raises:
        CodecError: the block size does not divide `in`, or a block has NaN or Inf.
        TypeError: `values` has another dtype. (float16 cannot hold the result; float64 would be rounded twice.)
    """
    work = _Rounding(values, block_format, _unit(tensor_scale, block_format), importance)
    count, nb, size, lanes = work.view.shape
    blocks = torch.empty((count, lanes, nb, size // 2), dtype=torch.uint8, device=values.device)
    near = None if rounded is None else _as_blocks(_view_as_matrices(rounded), size)
    beyond = None if saturated is None else saturated.view(count, lanes, nb).transpose(1, 2)
    for slab, part, amax, divisor in work:
        _put_transposed(blocks, slab, kernels.pack(part, divisor.inverse, divisor.significand))
        if near is not None:
            _put(near, slab, kernels.round_blocks(part, divisor.inverse, divisor.significand, divisor.scale))
        if beyond is not None:
            beyond[slab] = amax > scales.LARGEST_E2M1 * divisor.scale
    stored = work.scales.transpose(1, 2).contiguous().view(_SCALE_DTYPES[block_format.scale_type])
    return blocks.view(*values.shape[:-1], nb, size // 2), stored.view(*values.shape[:-1], nb)


def decode(
    blocks: Tensor,
    scales_: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    tensor_scale: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Unpack codes and dequantize them: value = e2m1(code) * scale.

    The result is exact in BF16 and FP32, within the range of the type.

    Args:
        blocks: (..., nb, block_size / 2) uint8.
        scales_: (..., nb) uint8 (e8m0) or float8_e4m3fn.
        dtype: data type of the result.
        tensor_scale: one scale per matrix, (...) float32. Only for float8_e4m3fn scales; otherwise None.
        out: output tensor, (..., in) with any strides. None allocates a contiguous tensor.

    Returns:
        (..., in) values. A NaN scale gives NaN. A value beyond the range of the dtype becomes Inf.
    """
    nb, half = blocks.shape[-2:]
    target = torch.empty((*blocks.shape[:-2], nb * half * 2), dtype=dtype, device=blocks.device) if out is None else out
    view = _as_blocks(_view_as_matrices(target), 2 * half)
    count, _, _, lanes = view.shape
    lanes_first = blocks.reshape(count, lanes, nb, half), scales_.reshape(count, lanes, nb)
    unit = _flat(tensor_scale)
    for slab in _slabs(view):
        experts, rows, columns = slab
        codes, stored = (part[experts, columns, rows] for part in lanes_first)
        unit_scale = scales.values_of(stored.transpose(1, 2).contiguous(), _of(unit, slab))
        _put(view, slab, kernels.unpack(_transpose(codes), unit_scale, view[0, 0, 0, :0]))
    return target


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two float32 or bfloat16 tensors have the same bits. Different types are widened first."""
    if one.dtype != other.dtype:
        one, other = one.float(), other.float()
    flat = [each.contiguous().view(-1) for each in (one, other)]
    # torch 2.13 compares 8-byte words four times faster. Both tensors must then start and end at whole words.
    ends = [end * one.element_size() for each in flat for end in (each.storage_offset(), len(each))]
    word = _BITS[one.dtype] if any(end % _WORD.itemsize for end in ends) else _WORD
    return one.shape == other.shape and torch.equal(*(each.view(word) for each in flat))


def fake_quantize(
    values: Tensor, block_format: BlockFormat, tensor_scale: Tensor | None = None, importance: Tensor | None = None
) -> Tensor:
    """Round values as `decode(encode(values))` does, in the dtype and memory order of `values`.

    The gradient passes straight through. Arguments and errors are the same as in `encode`. The only exception: a
    missing tensor scale is computed from the values.
    """
    return straight_through(values, _round(values, block_format, tensor_scale, importance))


def straight_through(values: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded`, and pass its gradient to `values` unchanged, in the dtype of `values`.

    The derivative of rounding is zero almost everywhere. It is replaced by 1 (Bengio et al. 2013, arXiv:1308.3432).
    """
    return _StraightThrough.apply(values, rounded)


def tensor_scale(values: Tensor, block_format: BlockFormat) -> Tensor | None:
    """Compute the tensor scale of each (out, in) matrix, or None if the format has none.

    The scales are powers of two, (...) float32.
    """
    if block_format.scale_type is ScaleType.e8m0:
        return None
    if values.numel() == 0:
        return torch.ones(values.shape[:-2], device=values.device)
    view = _view(values, block_format)
    return scales.tensor_scale_for_amax(_amax(view).amax(dim=(1, 2)), block_format.scale_rule).view(values.shape[:-2])


def differences(stacks: Sequence[Tensor]) -> Tensor:
    """Sum the squared errors of rounding, and count the weights that training changed.

    Args:
        stacks: values, rounded values, base values and rounded base values. Each is (E, rows, columns).

    Returns:
        (4) float64. The first two are the sum of squared rounding errors and the sum of squared values. The last two
        are the number of values that differ from the base, and the number of rounded values that differ from the
        rounded base.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=stacks[0].device)
    for matrices in zip(*stacks, strict=True):
        sums += kernels.row_differences(*matrices).double().sum(dim=1)
    return sums


def sum_of_squares(values: Tensor) -> float:
    """Sum the squares of (E, rows, columns) values, in the same way as `differences`."""
    return sum(float(kernels.row_squares(matrix).double().sum()) for matrix in values)


def unequal_blocks(one: Tensor, other: Tensor, block_format: BlockFormat) -> Tensor:
    """Mark the blocks in which two (E, in, out) tensors differ: (E, out, nb) bool. Signs of zeros are ignored."""
    blocks = [values.unflatten(1, (-1, block_format.block_size)) for values in (one, other)]
    experts, nb, _, lanes = blocks[0].shape
    found = torch.empty((experts, nb, lanes), dtype=torch.bool, device=one.device)
    for into, *pair in zip(found, *blocks, strict=True):
        into.copy_(kernels.count_unequal(*pair) > 0)
    return found.transpose(1, 2)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, values: Tensor, rounded: Tensor) -> Tensor:
        ctx.dtype = values.dtype  # type: ignore[attr-defined]
        return rounded.detach()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None  # type: ignore[attr-defined]


@torch.no_grad()
def _round(values: Tensor, block_format: BlockFormat, given: Tensor | None, importance: Tensor | None) -> Tensor:
    unit = _unit(tensor_scale(values, block_format) if given is None else given, block_format)
    work = _Rounding(values, block_format, unit, importance)
    result = torch.empty_like(_as_matrices(values))
    into = _as_blocks(result, block_format.block_size)
    for slab, part, _, divisor in work:
        _put(into, slab, kernels.round_blocks(part, divisor.inverse, divisor.significand, divisor.scale))
    return result.view(values.shape)


class _Rounding:
    """Iterates over values slab by slab. Each item is (slab, values, largest magnitude of each block, divisor).

    The iteration fills `scales`. After the last slab, it raises CodecError if a block has NaN or Inf.
    """

    def __init__(
        self, values: Tensor, block_format: BlockFormat, unit: Tensor | None, importance: Tensor | None
    ) -> None:
        self.view = _view(values, block_format)
        count, nb, _, lanes = self.view.shape
        self.scales = torch.empty((count, nb, lanes), dtype=torch.uint8, device=values.device)
        self._shape, self._format, self._unit = values.shape, block_format, unit
        self._weights = None if importance is None else _weights(importance, self.view)

    def __iter__(self) -> Iterator[tuple[Slab, Tensor, Tensor, Divisor]]:
        scale_type = self._format.scale_type
        for slab in _slabs(self.view):
            part, unit = _part(self.view, slab), _of(self._unit, slab)
            amax = kernels.block_amax(part).float()
            chosen, *others = scales.candidates(amax, scale_type, self._format.scale_rule, unit)
            for other in others:
                weights = self._weights_of(slab)
                chosen = _better(part, chosen, other, scale_type=scale_type, unit=unit, weights=weights)
            self.scales[slab] = chosen
            yield slab, part, amax, scales.divisor(chosen, scale_type, unit)
        _raise_if_not_finite(self.scales, self._shape, scale_type)

    def _weights_of(self, slab: Slab) -> Tensor | None:
        if self._weights is None:
            return None
        return self._weights[slab[0] if len(self._weights) > 1 else slice(None), slab[1]]


def _better(
    view: Tensor, first: Tensor, second: Tensor, *, scale_type: ScaleType, unit: Tensor | None, weights: Tensor | None
) -> Tensor:
    """Choose the scale with the smaller squared error for each block. In a tie, choose the first."""
    one, two = (scales.divisor(each, scale_type, unit) for each in (first, second))
    error_one, error_two = (kernels.squared_error(view, each.inverse, each.significand, weights) for each in (one, two))
    ratio = two.inverse / one.inverse  # exact, because both are powers of two
    return torch.where(error_two < error_one * (ratio * ratio), second, first)


def _weights(importance: Tensor, view: Tensor) -> Tensor:
    """Scale importance to whole numbers below 2^16: (..., in) -> (L or 1, nb, block, 1) float64.

    If all weights of a block are zero, they become 1.
    """
    if not bool((importance >= 0).all()):
        raise CodecError("importance must be a non-negative number for every input channel")
    nb, size = view.shape[1:3]
    blocks = importance.float().reshape(-1, nb, size, 1).double()
    exponent = torch.frexp(blocks.amax(dim=2, keepdim=True)).exponent
    whole = torch.floor(torch.ldexp(blocks, _WEIGHT_BITS - exponent))
    return torch.where(blocks.amax(dim=2, keepdim=True) > 0, whole, torch.ones_like(whole))


def _amax(view: Tensor) -> Tensor:
    """Return the largest magnitude of each block: (L, nb, block, lanes) -> (L, nb, lanes) float32."""
    amax = torch.empty((*view.shape[:2], view.shape[3]), dtype=torch.float32, device=view.device)
    for slab in _slabs(view):
        amax[slab] = kernels.block_amax(_part(view, slab))
    return amax


def _raise_if_not_finite(scale_bytes: Tensor, shape: torch.Size, scale_type: ScaleType) -> None:
    bad = scale_bytes == scales.NAN[scale_type]
    if bad.any():
        rows = bad.transpose(1, 2).reshape(*shape[:-1], -1)
        block = tuple(int(i) for i in rows.nonzero()[0])
        raise CodecError(f"NaN or Inf in {int(bad.sum())} blocks, the first at index {list(block)}", block)


def _view(values: Tensor, block_format: BlockFormat) -> Tensor:
    """Check the dtype and the block size, and view (..., out, in) as (L, nb, block, lanes)."""
    if values.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"values must be float32 or bfloat16, not {values.dtype}")
    if values.shape[-1] % block_format.block_size:
        raise CodecError(
            f"the input dimension {values.shape[-1]} is not a multiple of the block size {block_format.block_size}"
        )
    return _as_blocks(_as_matrices(values.detach()), block_format.block_size)


def _as_matrices(values: Tensor) -> Tensor:
    """Reshape (..., out, in) or (in) to (L, out, in)."""
    return values.reshape(_matrices(values.shape))


def _view_as_matrices(values: Tensor) -> Tensor:
    """Do the same as `_as_matrices`, but never copy, so that writing to the result changes `values`."""
    return values.view(_matrices(values.shape))


def _matrices(shape: torch.Size) -> tuple[int, int, int]:
    return math.prod(shape[:-2]), shape[-2] if len(shape) > 1 else 1, shape[-1]


def _as_blocks(matrices: Tensor, block_size: int) -> Tensor:
    """View (L, out, in) as (L, nb, block, lanes)."""
    return matrices.unflatten(-1, (-1, block_size)).permute(0, 2, 3, 1)


def _slabs(view: Tensor) -> Iterator[Slab]:
    """Split (L, nb, block, lanes) into slabs that fit the caches.

    All slabs have the same shape, so kernels are compiled once. The two expert stacks of a gpt-oss layer share this
    shape, although they have 5760 and 2880 lanes.
    """
    if view.numel() == 0:  # for example, the inputs of an expert that gets no token
        return
    count, nb, size, lanes = view.shape
    budget = _SLAB_VALUES.get(view.device.type, _SLAB_VALUES["cuda"])
    width = _largest_divisor(lanes, _SLAB_LANES)
    rows = _largest_divisor(nb, budget // (size * width))
    experts = max(1, budget // (nb * size * lanes)) if (rows, width) == (nb, lanes) else 1
    for i in range(0, count, experts):
        for j in range(0, nb, rows):
            for k in range(0, lanes, width):
                yield slice(i, i + experts), slice(j, j + rows), slice(k, k + width)


def _part(blocks: Tensor, slab: Slab) -> Tensor:
    """Take a slab of (L, nb, block, lanes). Contiguous lanes are copied; otherwise kernels would be compiled again."""
    experts, rows, lanes = slab
    part = blocks[experts, rows, :, lanes]
    return part.contiguous() if part.stride(-1) == 1 else part


def _put(blocks: Tensor, slab: Slab, part: Tensor) -> None:
    experts, rows, lanes = slab
    blocks[experts, rows, :, lanes] = part


def _largest_divisor(number: int, limit: int) -> int:
    return next((n for n in range(min(number, limit), 1, -1) if number % n == 0), 1)


def _put_transposed(blocks: Tensor, slab: Slab, codes: Tensor) -> None:
    """Transpose the codes of a slab, (l, rows, half, lanes), and store them in blocks (L, lanes, nb, half)."""
    experts, rows, lanes = slab
    for i, expert in enumerate(codes):
        turned = kernels.transpose(expert.reshape(-1, expert.shape[-1]))
        blocks[experts.start + i, lanes, rows] = turned.view(-1, *expert.shape[:-1])


def _transpose(codes: Tensor) -> Tensor:
    """Transpose (l, lanes, rows, half) to (l, rows, half, lanes), contiguous."""
    count, lanes, rows, half = codes.shape
    turned = [kernels.transpose(expert.reshape(lanes, -1)).view(rows, half, lanes) for expert in codes]
    return torch.stack(turned) if count > 1 else turned[0].unsqueeze(0)


def _unit(given: Tensor | None, block_format: BlockFormat) -> Tensor | None:
    if (given is None) != (block_format.scale_type is ScaleType.e8m0):
        wanted = "takes no" if given is not None else "needs a"
        raise TypeError(f"{block_format.name} {wanted} tensor scale")
    return _flat(given)


def _flat(unit: Tensor | None) -> Tensor | None:
    return None if unit is None else unit.reshape(-1)


def _of(unit: Tensor | None, slab: Slab) -> Tensor | None:
    return None if unit is None else unit[slab[0]]


_SCALE_DTYPES = {ScaleType.e8m0: torch.uint8, ScaleType.e4m3: torch.float8_e4m3fn}
