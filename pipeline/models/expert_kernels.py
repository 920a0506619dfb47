"""Selects the kernel that multiplies by the experts' weights in training.

- `eager` is a Python loop over the experts. Its backward pass writes one gradient per expert, each as large as the
  whole stack.
- `batched_mm` copies the weights of an expert for each of its tokens.
- `grouped_mm` is one product for all experts, over the tokens sorted by expert.

All kernels compute the same sums, but they add the terms in different orders. The kernels come from transformers.
With factored adapters (`adapters.attach`), they come from `expert_products` instead. There, `eager` writes no gradient
that is as large as a stack of weights. This module solves three problems:
- ModelOpt sets a model to eager when it inserts or restores quantizers, so the kernel must be set afterwards.
  Quantizers of weights run with every kernel. Quantizers of the inputs of `down_proj` do not run with `grouped_mm`.
- Autocast does not cover `grouped_mm`, and transformers 5.14 casts the inputs to the type of the weights. Under mixed
  precision, the weights are FP32. On GPUs, products in FP32 are many times slower than products in BF16. So the weights
  are cast to the compute type first. Each layer has two products, gate-up and down. The values between them are then
  BF16 too, as after a linear layer under autocast. With `eager`, these values are FP32.
- On GPUs, torch 2.13's kernel for `grouped_mm` needs BF16 and compute capability 9 or 10. Otherwise a grouped product
  is a loop over the experts. Before the loop, the host waits for the GPU, because it needs the number of rows of each
  expert.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from pipeline.checkpoints.gpt_oss import EXPERT_WEIGHTS
from pipeline.config import ExpertsImplementation, Precision
from pipeline.models import expert_products
from pipeline.models.adapters import base_of, is_factored
from pipeline.models.autocast import compute_dtype
from pipeline.models.expert_products import Factors, Multiply
from pipeline.models.packed_experts import PackedExperts, is_packed
from pipeline.numerics.formats import BlockFormat
from pipeline.runs.console import warn

Capability = tuple[int, int]
"""Compute capability of a GPU: major and minor number."""

_GROUPED = "grouped_mm_in_compute_dtype"
_FACTORED: dict[ExpertsImplementation, Multiply] = {
    ExpertsImplementation.eager: expert_products.multiply_in_loop,
    ExpertsImplementation.batched_mm: expert_products.multiply_batched,
    ExpertsImplementation.grouped_mm: expert_products.multiply_grouped,
}
_MAJORS_WITH_GROUPED_MM = (9, 10)


def use(model: nn.Module, asked: ExpertsImplementation, block_format: BlockFormat | None, precision: Precision) -> None:
    """Set the kernel for the experts of a model. Call this after adapters are attached and quantizers are inserted.

    Args:
        model: a gpt-oss model, with its final adapters and quantizers.
        asked: the configured kernel.
        block_format: format of the quantizers, or None if there are none.
        precision: precision of the training.
    """
    if is_packed(model):
        _use_for_packed(model, choose(asked, None, precision, _capability(), is_factored=True))
        return
    factored = is_factored(model)
    kernel = choose(asked, block_format, precision, _capability(), factored)
    ALL_EXPERTS_FUNCTIONS.register(_GROUPED, _grouped_mm)
    name = _GROUPED if kernel is ExpertsImplementation.grouped_mm else kernel.name
    if factored:
        name = f"{kernel.name}_with_factors"
        ALL_EXPERTS_FUNCTIONS.register(name, partial(_with_factors, _FACTORED[kernel]))
    base_of(model).set_experts_implementation(name)


def _use_for_packed(model: nn.Module, kernel: ExpertsImplementation) -> None:
    """Set the function that multiplies by decoded weights. It runs all quantizers, with every kernel."""
    for module in model.modules():
        if isinstance(module, PackedExperts):
            module.multiply = _FACTORED[kernel]


def choose(
    asked: ExpertsImplementation,
    block_format: BlockFormat | None,
    precision: Precision,
    capability: Capability | None,
    is_factored: bool,
) -> ExpertsImplementation:
    """Return the kernel to use, and warn if `grouped_mm` is used where torch has no kernel for it.

    `auto` is the fastest kernel that runs all quantizers. If torch has no kernel for `grouped_mm`, the fastest kernel
    depends on the adapters. With factored adapters it is `eager`: its loop waits for the GPU only once per layer.
    Without factored adapters it is `grouped_mm`: torch's loop waits for the GPU less often than transformers' `eager`.

    Args:
        asked: the configured kernel.
        block_format: format of the quantizers, or None if there are none.
        precision: precision of the training.
        capability: compute capability of the GPU, or None on a CPU.
        is_factored: whether the forward pass multiplies by the factors of adapters.
    """
    has_kernel = has_grouped_mm(capability, precision)
    if asked is ExpertsImplementation.auto:
        quantizes_inputs = block_format is not None and block_format.quantizes_activations
        loops = quantizes_inputs or (is_factored and not has_kernel)
        asked = ExpertsImplementation.eager if loops else ExpertsImplementation.grouped_mm
    if asked is ExpertsImplementation.grouped_mm and not has_kernel:
        warn("training", _describe_missing_kernel(capability, precision))
    return asked


def has_grouped_mm(capability: Capability | None, precision: Precision) -> bool:
    """Return whether torch computes grouped products without waiting for a GPU. On a CPU, this is always true."""
    return capability is None or (precision is not Precision.fp32 and capability[0] in _MAJORS_WITH_GROUPED_MM)


def _describe_missing_kernel(capability: Capability | None, precision: Precision) -> str:
    assert capability is not None
    return (
        f"precision={precision.name} on compute capability {capability[0]}.{capability[1]}: torch's kernel for"
        " grouped_mm needs BF16 and capability 9.x or 10.x. Here each product of a layer's experts waits for the GPU"
        " and loops over the experts. The results are right, but steps take longer. A GPU of capability 9.x or 10.x"
        " with precision=bf16 or mixed_bf16 avoids this."
    )


def _capability() -> Capability | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _with_factors(
    multiply: Multiply,
    experts: nn.Module,
    states: Tensor,
    chosen: Tensor,
    shares: Tensor,
    factors: Mapping[str, Factors] | None = None,
) -> Tensor:
    return expert_products.forward(experts, states, chosen, shares, factors or {}, multiply)


def _grouped_mm(experts: nn.Module, *inputs: Tensor) -> Tensor:
    return grouped_mm_experts_forward(_InComputeType(experts), *inputs)  # type: ignore[arg-type]


class _InComputeType:
    """A view of an experts module, with the weights cast to the type that autocast computes in."""

    def __init__(self, experts: nn.Module) -> None:
        self._experts = experts

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(compute_dtype(value)) if name in EXPERT_WEIGHTS else value
