"""The backend of ModelOpt's quantizers. It rounds with our codec, and stores our data on each quantizer.

The functions take ModelOpt's quantizers as arguments, but this module does not import ModelOpt.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.models.expert_products import Factors
from pipeline.models.rounded_weights import NonFinite, PackedWeights, RoundedWeights
from pipeline.numerics import packed_rounding
from pipeline.numerics.codec import encode, fake_quantize, tensor_scale
from pipeline.numerics.formats import FORMATS, BlockFormat
from pipeline.numerics.scales import INPUT_RULE, tensor_scale_for_amax

WEIGHTS = "_weight_quantizer"
INPUTS = "_input_quantizer"

Quantizer = Any
"""ModelOpt's TensorQuantizer."""


@dataclass
class State:
    """Our data on a quantizer. It is in ModelOpt's slot for backends. ModelOpt does not serialize this slot.

    Attributes:
        importance: weights of the squared errors, one for each input channel: shape (in), float32. They are used to
            choose scales. None if all channels have the same weight.
        cache: cache of rounded weights. If it is None, weights are rounded in every forward pass.
        is_rounded: whether the parameter itself holds rounded values.
        non_finite: flags that the codec sets on a GPU instead of raising an error, or None.
        observers: functions that each forward pass calls. The first argument is a tensor of rounded weights, with the
            shape (E, out, in). The second argument is the index of its first expert. Packed experts come part by part.
        shows_all: whether the observers need all packed experts, even experts that get no token.
    """

    importance: Tensor | None = None
    cache: RoundedWeights | None = None
    is_rounded: bool = False
    non_finite: NonFinite | None = None
    observers: list[Callable[[Tensor, int], None]] = field(default_factory=list)
    shows_all: bool = False


def state_of(quantizer: Quantizer) -> State:
    """Return our data on a quantizer."""
    if getattr(quantizer, "_quantizer_cache", None) is None:
        quantizer._quantizer_cache = State()
    return cast(State, quantizer._quantizer_cache)


def round_values(inputs: Tensor, quantizer: Quantizer, dtype: torch.dtype | None = None) -> Tensor:
    """Fake-quantize weights or inputs. ModelOpt calls this.

    Weights have the shape (E, out, in), and inputs have the shape (tokens, in). Blocks run along the last dimension.
    Inputs beyond the calibrated range saturate, as in the served model. `dtype` is the type of the result. If it is
    None, the result has the type of `inputs`.
    """
    block_format = format_of(quantizer)
    amax = quantizer.amax if quantizer.backend_extra_args["is_input"] else None
    scale = None if amax is None else tensor_scale_for_amax(amax.float(), INPUT_RULE)
    importance, is_bad = _importance(quantizer, inputs), _flag(quantizer, inputs)
    return fake_quantize(inputs, block_format, scale, importance, dtype=dtype, is_bad=is_bad)


def round_packed(
    packed: tuple[Tensor, Tensor], factors: Factors, experts: slice | Tensor, quantizer: Quantizer, dtype: torch.dtype
) -> Tensor:
    """Round base + delta of some experts, (g, in, out).

    Args:
        packed: blocks (g, out, nb, 16) and scales (g, out, nb) of the base.
        factors: factors of the adapters of all experts.
        experts: the experts.
        quantizer: the quantizer of the weights.
        dtype: type of the result.
    """
    importance = _importance(quantizer, packed[0])
    chosen = factors.a[experts], factors.b[experts], factors.scaling
    is_bad = _flag(quantizer, packed[0])
    return packed_rounding.round_packed(packed, chosen, format_of(quantizer), importance, dtype=dtype, is_bad=is_bad)


def _importance(quantizer: Quantizer, values: Tensor) -> Tensor | None:
    """Return the importance on the device of `values`. It is copied to a GPU only once."""
    state = state_of(quantizer)
    if state.importance is not None:
        state.importance = state.importance.to(values.device)
    return state.importance


def _flag(quantizer: Quantizer, values: Tensor) -> Tensor | None:
    """Return the flag that the codec sets on the device of `values`, or None if the codec raises an error instead."""
    non_finite = state_of(quantizer).non_finite
    return None if non_finite is None else non_finite.flag(values.device)


def format_of(quantizer: Quantizer) -> BlockFormat:
    """Return the format and scale rule of a quantizer."""
    arguments = quantizer.backend_extra_args
    return FORMATS[arguments["format"]].with_rule(arguments["scale_rule"])


def pack(weights: Tensor, quantizer: Quantizer) -> PackedWeights:
    """Round weights (g, in, out) and pack them."""
    values, block_format = weights.transpose(1, 2), format_of(quantizer)
    unit = tensor_scale(values, block_format)
    importance, is_bad = _importance(quantizer, values), _flag(quantizer, values)
    return PackedWeights(*encode(values, block_format, unit, importance, is_bad=is_bad), unit)


def packed_bytes(values: int, quantizer: Quantizer) -> int:
    """Return the size of a packed tensor in bytes: its codes and its scales. The tensor has `values` elements."""
    return values // 2 + values // format_of(quantizer).block_size
