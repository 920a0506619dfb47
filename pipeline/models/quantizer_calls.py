"""Count the calls of fake quantizers, to prove that each of them takes part in the forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from pipeline.errors import CheckFailed
from pipeline.models import fake_quantizers, quantizer_backend
from pipeline.models.adapted_names import parameter_name
from pipeline.models.adapters import base_of

See = Callable[[str, Tensor, int], None]
"""A function that sees fake-quantized weights.

Its first argument is the name of the parameter in the plain model. The second argument is a tensor of weights, with the
shape (E, out, in). The third argument is the index of its first expert. Weights of packed experts come part by part.
"""


@dataclass
class QuantizerCalls:
    """Counts the calls of each quantizer in forward passes.

    Attributes:
        calls: number of calls, keyed by the quantizer's name in the plain model.
    """

    calls: dict[str, int]

    def add(self, name: str) -> None:
        """Count one call."""
        self.calls[name] = self.calls.get(name, 0) + 1

    def raise_unless_all(self, model: nn.Module) -> None:
        """Check that exactly the enabled quantizers have run.

        Raises:
            CheckFailed: a quantizer did not run, or ran although it is disabled.
        """
        expected = {parameter_name(name) for name, _ in fake_quantizers.find_enabled(base_of(model))}
        silent, stray = sorted(expected - self.calls.keys()), sorted(self.calls.keys() - expected)
        if silent or stray:
            raise CheckFailed(
                f"fake quantization: did not run: {silent or 'none'}; ran although disabled: {stray or 'none'}"
            )


@contextmanager
def watch(model: nn.Module, see: See | None = None) -> Iterator[QuantizerCalls]:
    """Count how often each quantizer runs inside the block.

    Args:
        model: a model with quantizers.
        see: function that gets the fake-quantized weights of the forward pass. It gets all experts, even packed experts
            to which no token is routed.
    """
    fired = QuantizerCalls({})
    hooks = []
    observed = []
    for full_name, module in base_of(model).named_modules():
        if isinstance(module, fake_quantizers.TensorQuantizer):
            name = parameter_name(full_name)
            hooks.append(module.register_forward_hook(_hook(name, fired)))
            if name.endswith(quantizer_backend.WEIGHTS):
                state = quantizer_backend.state_of(module)
                observed.append((state, _observer(name, fired, see)))
                state.observers.append(observed[-1][1])
                state.shows_all = see is not None
    try:
        yield fired
    finally:
        for hook in hooks:
            hook.remove()
        for state, observer in observed:
            state.observers.remove(observer)
            state.shows_all = False


def _hook(name: str, fired: QuantizerCalls) -> fake_quantizers.Hook:
    def hook(module: fake_quantizers.TensorQuantizer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if module.is_enabled:
            fired.add(name)

    return hook


def _observer(name: str, fired: QuantizerCalls, see: See | None) -> Callable[[Tensor, int], None]:
    def observe(rounded: Tensor, first: int) -> None:
        fired.add(name)
        if see is not None:
            see(name.removesuffix(quantizer_backend.WEIGHTS), rounded, first)

    return observe
