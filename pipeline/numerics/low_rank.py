"""Adds the delta of a low-rank adapter to weights: W + s A B. The bits are the same on every device.

A library's matrix product may add its terms in any order. Here the terms are added in the order of the rank, and every
product and every sum is rounded to float32. So a merge on a CPU, as for an export, gives the same bits as training
on a GPU. The number of experts in one call does not matter.

Legend: E experts, r rank.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pipeline.numerics import slabs
from pipeline.numerics.compiled import Kernel, kernel

_VALUES_AT_ONCE = 1 << 27  # gradients of the delta that are held in float32 at once, 0.5 GB


def delta(like: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Compute s A B. Gradients flow to A and B.

    Args:
        like: weights (E, in, out), float32 or bfloat16. The result has their type.
        a: A, (E, in, r) float32.
        b: B, (E, r, out) float32.
        scaling: the factor s.

    Returns:
        (E, in, out). The float32 delta is rounded to the type of `like`.
    """
    found: Tensor = _Delta.apply(like, a, b, scaling)
    return found


@torch.no_grad()
def merge(base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return base + delta, in the type of `base`. See `delta` for the arguments. There are no gradients."""
    return _for_each_expert(add_delta, base, a, b, scaling)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    scaling: float


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, like: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.scaling = scaling
        return _for_each_expert(_delta, like, a, b, scaling)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[None, Tensor, Tensor, None]:
        (of_delta,) = gradients
        a, b = ctx.saved_tensors
        of_a, of_b = torch.empty_like(a), torch.empty_like(b)
        count = max(1, _VALUES_AT_ONCE // of_delta[0].numel())
        with torch.autocast(a.device.type, enabled=False):
            for start in range(0, len(a), count):
                part = slice(start, start + count)
                gradient = of_delta[part].float() * ctx.scaling
                of_a[part], of_b[part] = gradient @ b[part].transpose(1, 2), a[part].transpose(1, 2) @ gradient
        return None, of_a, of_b, None


def align(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return A (E, r, in) and B (E, r, out), contiguous float32, for the kernels."""
    return a.detach().float().transpose(1, 2).contiguous(), b.detach().float().contiguous()


def _for_each_expert(function: Kernel[Tensor], base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Call a kernel with whole stacks if it is compiled for a GPU. Otherwise, call it with one expert at a time."""
    rows, columns = align(a, b)
    if slabs.works_whole(base):
        found = function.run_compiled(base.detach(), rows, columns, scaling)
        if found is not None:
            return found
    result = torch.empty_like(base)
    for into, *expert in zip(result, base.detach(), rows, columns, strict=True):
        into.copy_(function(*expert, scaling))
    return result


@kernel
def _delta(like: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return (_sum_products(a, b) * scaling).to(like.dtype)


@kernel
def add_delta(base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return base + delta for (..., in, out), with A (..., r, in) and B (..., r, out)."""
    return base + (_sum_products(a, b) * scaling).to(base.dtype)


def _sum_products(a: Tensor, b: Tensor) -> Tensor:
    """Sum the products of `a` and `b` over the rank, in the order of the rank.

    `a` has the shape (..., r, in), and `b` has the shape (..., r, out). The result has the shape (..., in, out).
    """
    total = a[..., 0, :].unsqueeze(-1) * b[..., 0, :].unsqueeze(-2)
    for k in range(1, a.shape[-2]):
        total = total + a[..., k, :].unsqueeze(-1) * b[..., k, :].unsqueeze(-2)
    return total
