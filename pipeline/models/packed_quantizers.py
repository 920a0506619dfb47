"""Packed experts with fake quantizers. Adapters are merged and weights are rounded for a few experts at a time."""

from collections.abc import Iterator
from math import prod
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from pipeline.checkpoints.gpt_oss import EXPERT_WEIGHTS
from pipeline.models import quantizer_backend
from pipeline.models.expert_products import Factors
from pipeline.models.packed_experts import PackedExperts
from pipeline.models.quantizer_backend import INPUTS, WEIGHTS, Quantizer, state_of
from pipeline.numerics.codec import decode


class QuantizedPackedExperts(PackedExperts):
    """ModelOpt's quantized form of packed experts. The quantizers have the same names as for plain experts.

    Attributes:
        quantizer: class of the quantizers, set before ModelOpt makes an object of this class.
    """

    quantizer: ClassVar[type[nn.Module]]

    def _setup(self) -> None:
        """Add the quantizers. ModelOpt calls this."""
        for name in EXPERT_WEIGHTS:
            for kind in (INPUTS, WEIGHTS):
                setattr(self, name + kind, self.quantizer())

    def iter_weights_for_calibration(self) -> Iterator[Any]:
        """Return nothing: weights need no calibration, because our backend does not use their largest magnitude."""
        return iter(())

    def rounds(self, name: str) -> bool:
        """Return whether the quantizer of a projection's weights is on, and ModelOpt is not calibrating."""
        quantizer = self._quantizer(name)
        return bool(quantizer.is_enabled and quantizer._if_quant)

    def weights(self, name: str, experts: slice | Tensor, factors: Factors | None) -> Tensor:
        """Return the decoded weights. If `rounds` is true, merge the adapters into them, and then round them."""
        quantizer, state = self._quantizer(name), state_of(self._quantizer(name))
        if not self.rounds(name) or (state.is_rounded and factors is None):
            return self.decode(name, experts)
        if state.cache is None or not isinstance(experts, slice):
            return self._round(name, experts, factors)
        key = (quantizer, experts.start, factors is None)
        count = len(range(self.num_experts)[experts])
        kept = state.cache.packed(
            key,
            quantizer_backend.packed_bytes(count * prod(self.features[name]), quantizer),
            lambda: quantizer_backend.pack(self._merge(name, experts, factors), quantizer),
        )
        if kept is None:
            return self._round(name, experts, factors)
        result = self.new_weights(name, count)
        decode(kept.blocks, kept.scales, self.dtype, kept.tensor_scale, out=result.transpose(1, 2))
        return result

    def _merge(self, name: str, experts: slice | Tensor, factors: Factors | None) -> Tensor:
        base = self.decode(name, experts)
        return base if factors is None else factors.merge(base, experts)

    def _round(self, name: str, experts: slice | Tensor, factors: Factors | None) -> Tensor:
        quantizer = self._quantizer(name)
        if factors is None:
            weights = self.decode(name, experts).transpose(1, 2)
            return quantizer_backend.round_values(weights, quantizer).transpose(1, 2)
        return quantizer_backend.round_packed(self.packed(name, experts), factors, experts, quantizer, self.dtype)

    def quantize_inputs(self, name: str, rows: Tensor) -> Tensor:
        """Quantize the inputs of a projection, if their quantizer is enabled."""
        return cast(Tensor, getattr(self, name + INPUTS)(rows))

    @property
    def visits_all(self) -> bool:
        """Whether an observer needs the weights of all experts."""
        return any(state_of(self._quantizer(name)).shows_all for name in EXPERT_WEIGHTS)

    def observe(self, name: str, weights: Tensor, first: int) -> None:
        """Show the rounded weights of a part to the observers."""
        if self.rounds(name):
            for observe in state_of(self._quantizer(name)).observers:
                observe(weights.detach().transpose(1, 2), first)

    def _quantizer(self, name: str) -> Quantizer:
        return getattr(self, name + WEIGHTS)
