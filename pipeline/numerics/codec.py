"""The codec of training (fake quantization) and export: values to codes and scales, and back.

A block of values along the input dimension shares a scale. Each value is divided by the scale, and rounded to the
nearest of the 16 values of e2m1. Ties go to the even code (OCP MX v1.0, 5.3.3 and 6.3). The rule for the scale can be
chosen (see `formats.SCALE_RULES`).

All steps are exact, so every device gives the same bits. Compiled code gives these bits, too. The module `scales`
computes scales from the bits of the largest magnitude. The module `kernels` divides by powers of two and decides ties
by comparison.

Training and export must share one definition. ModelOpt's training kernel rounds ties to even, but its exporter rounds
ties toward zero. So 0.4 % of its exported BF16 weights differ from the trained weights.

Edge cases:
- Zeros, and values that round to zero, keep their sign.
- Subnormal values are rounded like others, with the smallest scale, 2^-127. (NVFP4: they become zero, because the
  tensor scale is at least 2^-110.)
- Values beyond 6 * scale saturate. This can happen under the rules `floor`, `nearest` and `mse`. It can also happen if
  the caller passes a tensor scale.
- Magnitudes of at least 3.5 * 2^126 always saturate. The format's next value would be 2^128, which is Inf in BF16 and
  FP32. (NVFP4: when scales are chosen, magnitudes above 2^127 count as 2^127.)
- A block with NaN or Inf raises an error instead of becoming zeros.

Values have the logical shape (..., out, in), with blocks along `in`. They may have any strides: an (E, in, out)
parameter can be passed as `parameter.transpose(-1, -2)` without a copy. The work is split into slabs, so temporaries
stay small.

Legend: in = input dimension, out = output dimension, nb = blocks per row = in / block_size, L = all leading dimensions.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.numerics import kernels, rounding, scales, slabs
from pipeline.numerics.formats import BlockFormat, ScaleType
from pipeline.numerics.scales import Divisor
from pipeline.numerics.stacks import decode_stack, round_stack

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
    is_bad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize values to codes and scales, and pack the codes.

    Args:
        values: shape (..., in) or (..., out, in), float32 or bfloat16, any strides. Blocks run along `in`.
        block_format: format of the result: a row of FORMATS, possibly with another scale rule.
        tensor_scale: result of the function `tensor_scale`. None for a format without a tensor scale.
        importance: factors of the squared errors of the rule `mse`: shape (in) or (..., in), float32, not negative.
            None if all channels are equally important.
        rounded: output for the decoded result, or None. It has the shape and type of `values`, and any strides.
        saturated: contiguous bool output (..., nb), or None. A block is True if a magnitude exceeds 6 * scale.
        is_bad: flag on the device of `values`, a bool tensor (), or None. NaN, Inf and negative importances set it
            and raise no error, so the CPU does not wait for the GPU.

    Returns:
        blocks: shape (..., nb, block_size / 2), uint8, contiguous. The low nibble of a byte holds the even element.
        scales: shape (..., nb), contiguous. The type is uint8 for e8m0, and float8_e4m3fn for e4m3.

    Raises:
        CodecError: the block size does not divide `in`. If there is no flag `is_bad`, there are two more causes: a
            block has NaN or Inf, or an importance is negative or NaN.
        TypeError: `values` has another dtype. (float16 cannot hold the result; float64 would be rounded twice.)
    """
    work = _Rounding(values, block_format, _unit(tensor_scale, block_format), importance, is_bad)
    count, nb, size, lanes = work.view.shape
    blocks = torch.empty((count, lanes, nb, size // 2), dtype=torch.uint8, device=values.device)
    near = None if rounded is None else slabs.as_blocks(slabs.view_as_matrices(rounded), size)
    beyond = None if saturated is None else saturated.view(count, lanes, nb).transpose(1, 2)
    _fill(work, blocks, near, beyond)
    return blocks.view(*values.shape[:-1], nb, size // 2), work.stored_scales()


def _fill(work: "_Rounding", blocks: Tensor, near: Tensor | None, beyond: Tensor | None) -> None:
    """Fill the outputs of `encode`, slab by slab."""
    for slab, part, amax, divisor in work:
        slabs.put_transposed(blocks, slab, kernels.pack(part, divisor.inverse, divisor.significand))
        if near is not None:
            slabs.put(near, slab, kernels.round_blocks(part, divisor.inverse, divisor.significand, divisor.scale))
        if beyond is not None:
            beyond[slab] = amax > scales.LARGEST_E2M1 * divisor.scale


def choose_scales(
    values: Tensor, block_format: BlockFormat, tensor_scale: Tensor | None = None, importance: Tensor | None = None
) -> Tensor:
    """Return the scales that `encode` would return, but do not encode the values. Errors are the same."""
    work = _Rounding(values, block_format, _unit(tensor_scale, block_format), importance)
    for _ in work:
        pass
    return work.stored_scales()


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
        blocks: shape (..., nb, block_size / 2), uint8.
        scales_: shape (..., nb). The type is uint8 for e8m0, and float8_e4m3fn for e4m3.
        dtype: data type of the result.
        tensor_scale: one scale per matrix: shape (...), float32. None if the scales are e8m0.
        out: output tensor of the shape (..., in), with any strides. None allocates a contiguous tensor.

    Returns:
        The values, shape (..., in). A NaN scale gives NaN. A value beyond the range of the dtype becomes Inf.
    """
    nb, half = blocks.shape[-2:]
    target = torch.empty((*blocks.shape[:-2], nb * half * 2), dtype=dtype, device=blocks.device) if out is None else out
    view = slabs.as_blocks(slabs.view_as_matrices(target), 2 * half)
    count, _, _, lanes = view.shape
    lanes_first = blocks.reshape(count, lanes, nb, half), scales_.reshape(count, lanes, nb)
    unit = _flat(tensor_scale)
    if slabs.works_whole(target):
        codes, stored = lanes_first
        numbers = stored if stored.dtype == torch.uint8 else stored.float()  # Triton has no float8_e4m3fn for sm_80
        if decode_stack.run_compiled(codes, numbers, unit, view) is not None:
            return target
    for slab in slabs.split(view):
        experts, rows, columns = slab
        codes, stored = (part[experts, columns, rows] for part in lanes_first)
        unit_scale = scales.values_of(stored.transpose(1, 2).contiguous(), _of(unit, slab))
        slabs.put(view, slab, kernels.unpack(slabs.transpose(codes), unit_scale, view[0, 0, 0, :0]))
    return target


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two float32 or bfloat16 tensors have the same bits. If the types differ, both become float32."""
    if one.dtype != other.dtype:
        one, other = one.float(), other.float()
    flat = [each.contiguous().view(-1) for each in (one, other)]
    # torch 2.13 compares 8-byte words four times faster than smaller elements. Words can be compared if both
    # tensors start and end at multiples of 8 bytes.
    ends = [end * one.element_size() for each in flat for end in (each.storage_offset(), len(each))]
    word = _BITS[one.dtype] if any(end % _WORD.itemsize for end in ends) else _WORD
    return one.shape == other.shape and torch.equal(*(each.view(word) for each in flat))


def fake_quantize(
    values: Tensor,
    block_format: BlockFormat,
    tensor_scale: Tensor | None = None,
    importance: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    is_bad: Tensor | None = None,
) -> Tensor:
    """Round values as `decode(encode(values))` does. The result has the memory order of `values`.

    The gradient passes straight through. Arguments and errors are the same as in `encode`, with one exception. If
    `tensor_scale` is missing, it is computed from the values. `encode` has no `dtype`.

    Args:
        values, block_format, tensor_scale, importance, is_bad: see `encode`.
        dtype: type of the result, float32 or bfloat16. Both hold every value of the formats. None means the type of
            `values`.
    """
    return straight_through(values, _round(values, block_format, tensor_scale, importance, dtype=dtype, is_bad=is_bad))


def straight_through(values: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded`. In the backward pass, `values` gets the gradient of the result, cast to the dtype of `values`.

    The derivative of rounding is zero almost everywhere. It is replaced by 1 (Bengio et al. 2013, arXiv:1308.3432).
    """
    return _StraightThrough.apply(values, rounded)


def tensor_scale(values: Tensor, block_format: BlockFormat) -> Tensor | None:
    """Compute the tensor scale of each (out, in) matrix, or None if the format has none.

    The scales are powers of two. They have the shape (...) and the type float32.
    """
    if block_format.scale_type is ScaleType.e8m0:
        return None
    if values.numel() == 0:
        return torch.ones(values.shape[:-2], device=values.device)
    view = view_blocks(values, block_format)
    return scales.tensor_scale_for_amax(_amax(view).amax(dim=(1, 2)), block_format.scale_rule).view(values.shape[:-2])


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, values: Tensor, rounded: Tensor) -> Tensor:
        ctx.dtype = values.dtype  # type: ignore[attr-defined]
        return rounded.detach()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None  # type: ignore[attr-defined]


@torch.no_grad()
def _round(
    values: Tensor,
    block_format: BlockFormat,
    given: Tensor | None,
    importance: Tensor | None,
    *,
    dtype: torch.dtype | None,
    is_bad: Tensor | None,
) -> Tensor:
    if given is not None:
        _unit(given, block_format)
    found = _round_whole(values, block_format, given, importance, dtype=dtype or values.dtype, is_bad=is_bad)
    if found is not None:
        return found
    unit = _unit(tensor_scale(values, block_format) if given is None else given, block_format)
    work = _Rounding(values, block_format, unit, importance, is_bad)
    result = torch.empty_like(slabs.as_matrices(values), dtype=dtype)
    into = slabs.as_blocks(result, block_format.block_size)
    for slab, part, _, divisor in work:
        slabs.put(into, slab, kernels.round_blocks(part, divisor.inverse, divisor.significand, divisor.scale))
    return result.view(values.shape)


def _round_whole(
    values: Tensor,
    block_format: BlockFormat,
    given: Tensor | None,
    importance: Tensor | None,
    *,
    dtype: torch.dtype,
    is_bad: Tensor | None,
) -> Tensor | None:
    """Round with one compiled function. Return None on a CPU, or if compiling does not pay off.

    If a value is bad, set the flag `is_bad` and return the rounded values. If there is no flag, return None. The
    caller then rounds slab by slab and finds the bad block.
    """
    if not slabs.works_whole(values):
        return None
    view = view_blocks(values, block_format)
    weights = _weights(importance, view, is_bad)
    arguments = (block_format.scale_type, block_format.scale_rule, _flat(given), weights, dtype)
    found = round_stack.run_compiled(view, *arguments)
    if found is None:
        return None
    rounded, is_bad_here = found
    return rounded.permute(0, 3, 1, 2).reshape(values.shape) if note_bad(is_bad_here, is_bad) else None


def note_bad(found: Tensor, flag: Tensor | None) -> bool:
    """Set the flag if a value is bad. Return whether the rounded values can be used.

    They can always be used if there is a flag. Without one, this function reads `found`.

    Args:
        found: whether a value is bad: shape (), bool.
        flag: the flag, or None.
    """
    if flag is None:
        return not bool(found)
    flag.logical_or_(found)
    return True


class _Rounding:
    """Iterates over values slab by slab. Each item is (slab, values, largest magnitude of each block, divisor).

    The iteration fills `scales`. After the last slab, it raises CodecError if a block has NaN or Inf. If the
    caller passed `is_bad`, it sets this flag instead.
    """

    def __init__(
        self,
        values: Tensor,
        block_format: BlockFormat,
        unit: Tensor | None,
        importance: Tensor | None,
        is_bad: Tensor | None = None,
    ) -> None:
        self.view = view_blocks(values, block_format)
        count, nb, _, lanes = self.view.shape
        self.scales = torch.empty((count, nb, lanes), dtype=torch.uint8, device=values.device)
        self._shape, self._format, self._unit, self._is_bad = values.shape, block_format, unit, is_bad
        self._weights = _weights(importance, self.view, is_bad)

    def __iter__(self) -> Iterator[tuple[slabs.Slab, Tensor, Tensor, Divisor]]:
        scale_type = self._format.scale_type
        for slab in slabs.split(self.view):
            part, unit = slabs.take(self.view, slab), _of(self._unit, slab)
            amax, weights = kernels.block_amax(part).float(), self._weights_of(slab)
            chosen = rounding.choose_scales(part, amax, scale_type, self._format.scale_rule, unit=unit, weights=weights)
            self.scales[slab] = chosen
            yield slab, part, amax, scales.divisor(chosen, scale_type, unit)
        bad = self.scales == scales.NAN[scale_type]
        if self._is_bad is None:
            _raise_if_any(bad, self._shape)
        else:
            self._is_bad.logical_or_(bad.any())

    def stored_scales(self) -> Tensor:
        """Return the scales as `encode` does, after the last slab."""
        lanes_first = self.scales.transpose(1, 2).contiguous().view(_SCALE_DTYPES[self._format.scale_type])
        return lanes_first.view(*self._shape[:-1], self.scales.shape[1])

    def _weights_of(self, slab: slabs.Slab) -> Tensor | None:
        if self._weights is None:
            return None
        return self._weights[slab[0] if len(self._weights) > 1 else slice(None), slab[1]]


def _weights(importance: Tensor | None, view: Tensor, is_bad: Tensor | None) -> Tensor | None:
    """Return the weights of the squared errors, or None if there is no importance.

    If importance is invalid, set the flag `is_bad`. Without a flag, raise an error.
    """
    if importance is None:
        return None
    if is_bad is None:
        _raise_if_not_importance(importance)
    else:
        is_bad.logical_or_(~(importance >= 0).all())
    return rounding.error_weights(importance, view)


def _amax(view: Tensor) -> Tensor:
    """Return the largest magnitude of each block: (L, nb, block, lanes) -> (L, nb, lanes) float32."""
    amax = torch.empty((*view.shape[:2], view.shape[3]), dtype=torch.float32, device=view.device)
    for slab in slabs.split(view):
        amax[slab] = kernels.block_amax(slabs.take(view, slab))
    return amax


def _raise_if_not_importance(importance: Tensor) -> None:
    if not bool((importance >= 0).all()):
        raise CodecError("importance must be a non-negative number for every input channel")


def raise_if_not_finite(values: Tensor, block_format: BlockFormat) -> None:
    """Raise CodecError if a block of (..., out, in) values has NaN or Inf."""
    _raise_if_any(~_amax(view_blocks(values, block_format)).isfinite(), values.shape)


def _raise_if_any(bad: Tensor, shape: torch.Size) -> None:
    """Raise CodecError if a block is bad. `bad` has the shape (L, nb, lanes). The values have the shape `shape`."""
    if bad.any():
        rows = bad.transpose(1, 2).reshape(*shape[:-1], -1)
        block = tuple(int(i) for i in rows.nonzero()[0])
        raise CodecError(f"NaN or Inf in {int(bad.sum())} blocks, the first at index {list(block)}", block)


def view_blocks(values: Tensor, block_format: BlockFormat) -> Tensor:
    """Check the dtype and the block size. View values of the shape (..., out, in) as (L, nb, block, lanes)."""
    if values.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"values must be float32 or bfloat16, not {values.dtype}")
    if values.shape[-1] % block_format.block_size:
        raise CodecError(
            f"the input dimension {values.shape[-1]} is not a multiple of the block size {block_format.block_size}"
        )
    return slabs.as_blocks(slabs.as_matrices(values.detach()), block_format.block_size)


def _unit(given: Tensor | None, block_format: BlockFormat) -> Tensor | None:
    if (given is None) != (block_format.scale_type is ScaleType.e8m0):
        wanted = "takes no" if given is not None else "needs a"
        raise TypeError(f"{block_format.name} {wanted} tensor scale")
    return _flat(given)


def _flat(unit: Tensor | None) -> Tensor | None:
    return None if unit is None else unit.reshape(-1)


def _of(unit: Tensor | None, slab: slabs.Slab) -> Tensor | None:
    return None if unit is None else unit[slab[0]]


_SCALE_DTYPES = {ScaleType.e8m0: torch.uint8, ScaleType.e4m3: torch.float8_e4m3fn}
