"""Selects the kernel that multiplies by the experts' weights in training. All kernels come from transformers.

- `eager` is a Python loop over the experts. For each expert, its backward pass writes a gradient of the whole stack.
- `batched_mm` copies the weights of an expert for each of its tokens.
- `grouped_mm` is one product for all experts, over the tokens sorted by expert.

All kernels compute the same sums, but each adds in its own order. This module solves two problems:
- ModelOpt sets a model to eager when it inserts or restores quantizers, so the kernel must be set afterwards.
  Quantizers of weights run with every kernel. Quantizers of the inputs of `down_proj` do not run with `grouped_mm`.
- Autocast does not cover `grouped_mm`, and transformers 5.14 casts the inputs to the type of the weights. Under mixed
  precision the weights are FP32, and FP32 products are many times slower than BF16 on GPUs. So the weights are cast to
  the compute type first. The values between the two products are then BF16 too, as after a linear layer under autocast.
  With `eager`, these values are FP32.
"""

from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from pipeline.checkpoints.gpt_oss import EXPERT_WEIGHTS
from pipeline.config import ExpertsImplementation
from pipeline.models.adapters import base_of
from pipeline.models.rounded_weights import compute_dtype
from pipeline.numerics.formats import BlockFormat

_GROUPED = "grouped_mm_in_compute_dtype"


def use(model: nn.Module, asked: ExpertsImplementation, block_format: BlockFormat | None) -> None:
    """Set the kernel for the experts of a model. Call this after quantizers are inserted or restored.

    Args:
        model: a gpt-oss model, with its final adapters and quantizers.
        asked: the configured kernel. `auto` selects the fastest kernel that runs all quantizers.
        block_format: format of the quantizers, or None if there are none.
    """
    if asked is ExpertsImplementation.auto:
        quantizes_inputs = block_format is not None and block_format.quantizes_activations
        asked = ExpertsImplementation.eager if quantizes_inputs else ExpertsImplementation.grouped_mm
    ALL_EXPERTS_FUNCTIONS.register(_GROUPED, _grouped_mm)
    name = _GROUPED if asked is ExpertsImplementation.grouped_mm else asked.name
    base_of(model).set_experts_implementation(name)


def _grouped_mm(experts: nn.Module, *inputs: Tensor) -> Tensor:
    return grouped_mm_experts_forward(_InComputeType(experts), *inputs)  # type: ignore[arg-type]


class _InComputeType:
    """A view of an experts module. It casts the weights to the type that autocast computes in."""

    def __init__(self, experts: nn.Module) -> None:
        self._experts = experts

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(compute_dtype(value)) if name in EXPERT_WEIGHTS else value
