"""The kernel that training multiplies the experts' weights with: one of transformers', in the type of the precision.

`eager` is a Python loop over the experts, whose backward pass fills a gradient as large as the whole stack for each of
them; `batched_mm` copies the weights of an expert for each token that goes there; `grouped_mm` is one product for all
experts over the tokens sorted by expert. All compute the same but for the order of sums. Two traps are closed here:

- ModelOpt sets a model to eager when it inserts or restores quantizers. Those of weights run with every kernel, so what
  was asked for is set afterwards. Those of the inputs of `down_proj` hang on operators that `grouped_mm` does not use.
- Autocast knows nothing of `grouped_mm`, and transformers 5.14 turns the inputs into the type of the weights: FP32
  under mixed precision, at which GPUs are many times slower than at BF16. So the weights are turned first. What lies
  between the two products is then BF16, too, as in a linear layer under autocast; `eager` happens to keep it in FP32.
"""

from typing import Any

from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from pipeline.adapters import base_of
from pipeline.config import ExpertsImplementation
from pipeline.gpt_oss import EXPERT_WEIGHTS
from pipeline.numerics.formats import BlockFormat
from pipeline.rounding import compute_dtype

_GROUPED = "grouped_mm_in_compute_dtype"


def use(model: Any, asked: ExpertsImplementation, block_format: BlockFormat | None) -> None:
    """Let a model compute its experts with the kernel asked for; after everything else has been done to the model.

    Args:
        model: a gpt-oss, with whatever adapters and quantizers it is to have.
        asked: `auto` is the fastest that runs all quantizers.
        block_format: of the quantizers, or None.
    """
    if asked is ExpertsImplementation.auto:
        quantizes_inputs = block_format is not None and block_format.quantizes_activations
        asked = ExpertsImplementation.eager if quantizes_inputs else ExpertsImplementation.grouped_mm
    ALL_EXPERTS_FUNCTIONS.register(_GROUPED, _grouped_mm)
    name = _GROUPED if asked is ExpertsImplementation.grouped_mm else asked.name
    base_of(model).set_experts_implementation(name)


def _grouped_mm(experts: Any, *inputs: Tensor) -> Tensor:
    return grouped_mm_experts_forward(_InComputeType(experts), *inputs)  # type: ignore[arg-type]


class _InComputeType:
    """A module of experts as its kernel reads it, with the weights in the type that autocast computes in."""

    def __init__(self, experts: Any) -> None:
        self._experts = experts

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(compute_dtype(value)) if name in EXPERT_WEIGHTS else value
