"""Attention with sinks: `attn_implementation=fused_sinks`. torch's own flash kernels run forward and backward.

A sink is one more logit in the softmax of a head. It takes probability but has no value. torch's flash kernels do not
know sinks, but they return the log-sum-exp of each query's scores. The sink is therefore added after the kernel:

    total = logaddexp(lse, sink)         O' = O · exp(lse - total)
    dQ, dK, dV = flash backward of dO' with O' and total in the places of O and lse
    dsink = -sum over queries of exp(sink - total) · rowsum(dO' · O')

From these inputs, the kernel's backward pass computes two values: the probabilities, exp(score - total), and
rowsum(dO' · O'). Attention with sinks has the same two values, so the gradients are right. No tensor holds the scores
of all queries and keys.

The kernels get the tokens of a batch as one long row, cut into segments. A packed document is one segment. A padded
row is three: the padding before the tokens, the tokens, and the padding after them. Queries see the keys of their own
segment, up to themselves and within the window. So every query sees at least itself, and padding needs no other mask.
The bounds of padded rows are computed on the device, so the host does not wait for the device.

During generation, queries that follow a cache need another mask. They use transformers' eager attention with eager's
mask. The tensor of their scores is small, because such queries are few. With a static cache, the queries of the prompt
use eager too.

On a CPU, torch's flash kernel for CPUs computes one segment after the other. The CUDA kernel needs BF16 or FP16 and a
GPU of compute capability 8.0 or higher. Importing this module registers the attention in transformers as FUSED_SINKS.

Legend: B = rows, T = tokens in a row, S = B·T = tokens in a batch, N = query heads, d = size of a head.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from pipeline.errors import UserError
from pipeline.models.attention import FUSED_SINKS
from pipeline.models.autocast import compute_dtype

aten = torch.ops.aten


class Segments(NamedTuple):
    """The segments of a batch. A layer gets them in place of a mask.

    Attributes:
        bounds: start of each segment, followed by S: shape (segments + 1), int32. The values never decrease. A segment
            may be empty.
        longest: an upper bound of the segments' lengths.
    """

    bounds: Tensor
    longest: int


def whole_rows(rows: int, length: int, device: torch.device | str) -> Segments:
    """Make one segment of each row."""
    return Segments(torch.arange(rows + 1, device=device, dtype=torch.int32) * length, length)


def padded_rows(is_real: Tensor) -> Segments:
    """Make three segments of each row: padding, tokens, padding. Each may be empty.

    Args:
        is_real: True for tokens, False for padding: shape (B, T), bool. The tokens of a row are adjacent.
    """
    rows, length = is_real.shape
    places = torch.arange(length, device=is_real.device)
    first = places.where(is_real, length).amin(1)
    last = (places + 1).where(is_real, 0).amax(1).maximum(first)
    is_adjacent = (is_real.sum(1) == last - first).all()
    torch._assert_async(is_adjacent, f"attn_implementation={FUSED_SINKS}: padding between the tokens of a row")
    starts = torch.stack([torch.zeros_like(first), first, last], 1)
    starts += torch.arange(rows, device=is_real.device)[:, None] * length
    return Segments(functional.pad(starts.flatten(), (0, 1), value=rows * length).int(), length)


def packed_row(positions: Tensor) -> Segments:
    """Make one segment of each document. This copies the positions to the host.

    Args:
        positions: int (B, T). Each row and each document begins at position 0.
    """
    on_host = positions.flatten().cpu()
    bounds = functional.pad((on_host == 0).nonzero().flatten(), (0, 1), value=len(on_host)).int()
    return Segments(bounds.to(positions.device), int(bounds.diff().max()))


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **rest: Any,
) -> Segments | Tensor | None:
    """Make the mask of a layer, for transformers' AttentionMaskInterface.

    Returns:
        The segments of the rows, or eager's mask. Eager's mask is needed if the queries follow a cache, or if the mask
        has a condition besides causality and the window.
    """
    is_causal = allow_is_causal_skip and not use_vmap  # no condition besides causality and window
    is_first = isinstance(q_offset, int) and q_offset == kv_offset == 0 and q_length == kv_length
    if not (is_causal and is_first):
        return eager_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,  # type: ignore[arg-type]  # a static cache has a tensor here
            kv_offset,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            device=device,
            **rest,
        )
    if attention_mask is None:
        return whole_rows(batch_size, q_length, device)
    return padded_rows(attention_mask.bool())


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Segments | Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of a gpt-oss layer, for transformers' AttentionInterface.

    Args:
        module: the attention layer. Its `sinks` (N) are read.
        query, key, value: (B, heads, T, d). Several query heads may share a key head.
        attention_mask: result of `make_mask`. If it is a tensor, eager attention adds it to the scores.
        scaling: factor of the scores.
        dropout: must be 0.
        sliding_window: number of keys that a query sees, including its own. None means its own and all earlier keys.

    Returns:
        The output of shape (B, T, N, d), and the attention weights. Only eager attention returns weights. Otherwise,
        the second value is None.

    Raises:
        UserError: the model has dropout in its attention.
        ValueError: there are segments, but the numbers of queries and keys differ.
    """
    if not isinstance(attention_mask, Segments):
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout)
    _raise_if_impossible(query, key, dropout)
    rows, length = query.shape[0], query.shape[2]
    dtype = compute_dtype(query)
    tokens = [each.transpose(1, 2).flatten(0, 1).to(dtype) for each in (query, key, value)]
    layer = _Layer(max(attention_mask.longest, 2), sliding_window, scaling)  # for 1, the CUDA kernel assumes decoding
    out: Tensor = _SinkAttention.apply(*tokens, module.sinks, attention_mask.bounds, layer)
    return out.unflatten(0, (rows, length)), None


def _raise_if_impossible(query: Tensor, key: Tensor, dropout: float) -> None:
    if query.shape[2] != key.shape[2]:  # otherwise the kernels would read the wrong memory
        raise ValueError(f"{query.shape[2]} queries and {key.shape[2]} keys have no common segments")
    if dropout:
        raise UserError(
            f"attn_implementation={FUSED_SINKS}: cannot apply dropout, but the model's config.json has"
            f" attention_dropout={dropout}. Use attn_implementation=eager, or set attention_dropout to 0."
        )


class _Layer(NamedTuple):
    """The kernels' arguments that are not tensors."""

    longest: int
    window: int | None
    scale: float


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    layer: _Layer


class _SinkAttention(torch.autograd.Function):
    """Attention with sinks. Queries, keys and values have the shape (S, heads, d). Sinks have the shape (N)."""

    @staticmethod
    def forward(
        ctx: _Context, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, bounds: Tensor, layer: _Layer
    ) -> Tensor:
        run = _forward_on_cpu if query.device.type == "cpu" else _forward_on_cuda
        out, lse, *state = run(query, key, value, bounds, layer)
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])  # (N, S)
        out.mul_((lse - total).exp_().T[..., None])
        ctx.save_for_backward(query, key, value, sinks, out, total, bounds, *state)
        ctx.layer = layer
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, total, bounds, *state = ctx.saved_tensors
        run = _backward_on_cpu if query.device.type == "cpu" else _backward_on_cuda
        gradients = run(grad.contiguous(), query, key, value, out, *state, total=total, bounds=bounds, layer=ctx.layer)
        return (*gradients, _sinks_gradient(grad, out, total, sinks) if ctx.needs_input_grad[3] else None, None, None)


def _sinks_gradient(grad: Tensor, out: Tensor, total: Tensor, sinks: Tensor) -> Tensor:
    weight = (sinks.to(total.dtype)[:, None] - total).exp_()  # (N, S), the probability of the sink
    along = grad.to(total.dtype, copy=True).mul_(out).sum(-1)  # (S, N)
    return -torch.linalg.vecdot(weight, along.T).to(sinks.dtype)


def _forward_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, layer: _Layer
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output (S, N, d), the log-sum-exp (N, S) in FP32, and the kernel's two random states."""
    out, lse, seed, offset, _ = aten._flash_attention_forward(
        query,
        key,
        value,
        bounds,
        bounds,
        layer.longest,
        layer.longest,
        0.0,
        True,
        False,
        scale=layer.scale,
        window_size_left=_keys_before(layer),
    )
    return out, lse, seed, offset


def _backward_on_cuda(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    *state: Tensor,
    total: Tensor,
    bounds: Tensor,
    layer: _Layer,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = aten._flash_attention_backward(
        grad,
        query,
        key,
        value,
        out,
        total.contiguous(),
        bounds,
        bounds,
        layer.longest,
        layer.longest,
        0.0,
        True,
        *state,
        scale=layer.scale,
        window_size_left=_keys_before(layer),
    )
    return gradients


def _keys_before(layer: _Layer) -> int | None:
    """Return how many earlier keys a query sees besides its own, or None if it sees all."""
    return None if layer.window is None else layer.window - 1


def _forward_on_cpu(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, layer: _Layer) -> tuple[Tensor, Tensor]:
    """Do the same as `_forward_on_cuda`, segment by segment. For FP64 inputs, the log-sum-exp is FP64."""
    out = torch.empty_like(query)
    dtype = torch.promote_types(query.dtype, torch.float32)
    lse = torch.empty(query.shape[1::-1], dtype=dtype, device=query.device)
    keys, values = _for_each_query(key, query), _for_each_query(value, query)
    for part in _parts(bounds):
        own = [_heads_first(each[part]) for each in (query, keys, values)]
        mask = _window_mask(own[0], layer.window)
        own_out, own_lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *own, 0.0, mask is None, attn_mask=mask, scale=layer.scale
        )
        out[part], lse[:, part] = own_out[0].transpose(0, 1), own_lse[0]
    return out, lse


def _backward_on_cpu(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    *,
    total: Tensor,
    bounds: Tensor,
    layer: _Layer,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = _for_each_query(key, query), _for_each_query(value, query)
    gradients = [torch.empty_like(each) for each in (query, keys, values)]
    for part in _parts(bounds):
        own = [_heads_first(each[part]) for each in (grad, query, keys, values, out)]
        mask = _window_mask(own[1], layer.window)
        lse = total[None, :, part].transpose(1, 2).contiguous().transpose(1, 2)  # the forward kernel's layout of lse
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *own, lse, 0.0, mask is None, attn_mask=mask, scale=layer.scale
        )
        for into, gradient in zip(gradients, found, strict=True):
            into[part] = gradient[0].transpose(0, 1)
    of_query, of_keys, of_values = gradients
    shape = (len(key), key.shape[1], -1, key.shape[2])  # (S, key heads, query heads per key head, d)
    return of_query, of_keys.view(shape).sum(2), of_values.view(shape).sum(2)


def _parts(bounds: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(bounds.tolist()) if start < end]


def _for_each_query(states: Tensor, query: Tensor) -> Tensor:
    """Repeat each key head for the query heads that share it. `states` has the shape (S, key heads, d)."""
    return states.repeat_interleave(query.shape[1] // states.shape[1], 1)


def _heads_first(states: Tensor) -> Tensor:
    """Reorder states (T, N, d) to (1, N, T, d)."""
    return states.transpose(0, 1)[None]


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """Return the mask that is added to the scores, shape (T, T). Return None if the window hides nothing."""
    length = query.shape[2]
    if window is None or window >= length:
        return None
    places = torch.arange(length, device=query.device)
    age = places[:, None] - places
    hidden = (age < 0) | (age >= window)
    return torch.zeros(length, length, dtype=query.dtype, device=query.device).masked_fill_(hidden, -torch.inf)


AttentionInterface.register(FUSED_SINKS, attend)
AttentionMaskInterface.register(FUSED_SINKS, make_mask)
