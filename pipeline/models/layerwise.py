"""Run a model one decoder layer at a time, over the hidden states of many examples.

Only the part of one layer outside of its experts is in memory: attention, norms, router and the experts' biases. The
caller gives the weights of the experts, a few experts at a time, and may give other weights than those on disk. Masks
and position embeddings come from the forward pass of transformers' own decoder. The other layers do nothing in it.

Padding is no token: hidden states are stored without it, and neither the router nor an expert sees it.

Legend: N = tokens of all examples, B = rows of a batch, T = positions of a row, H = hidden size, I = intermediate size,
V = vocabulary size, E = experts, K = experts per token, n = tokens of an expert.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.checkpoints.gpt_oss import (
    BIAS_SUFFIX,
    DOWN,
    EMBEDDING,
    EXPERT_WEIGHTS,
    FINAL_NORM,
    GATE_UP,
    HEAD,
    in_layer,
)
from pipeline.models import streaming
from pipeline.models.weights import Weights

TOKENS_AT_ONCE = 8192
"""Tokens that an expert computes at once. Their widest tensor takes 0.1 GB in BF16 for gpt-oss."""


Positions = tuple[Tensor, Tensor]
"""Rows and columns of the tokens of a batch, both (tokens) int64."""


class Routed(NamedTuple):
    """What a layer gives to its experts.

    Attributes:
        residual: states to which the output of the experts is added, (N, H).
        inputs: inputs of the experts, (N, H).
        tokens: for each expert, the indices of its tokens, (n) int64, ascending.
        shares: for each expert, the factor of its output for each of its tokens, (n).
    """

    residual: Tensor
    inputs: Tensor
    tokens: Sequence[Tensor]
    shares: Sequence[Tensor]

    def parts(self, expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Split the tokens and shares of an expert into parts of at most TOKENS_AT_ONCE tokens. Skip an empty part."""
        if len(self.tokens[expert]):
            yield from zip(*(each[expert].split(TOKENS_AT_ONCE) for each in (self.tokens, self.shares)), strict=True)


@dataclass(frozen=True)
class _Batch:
    """A batch without its states: token ids and mask (B, T), and the positions of its tokens."""

    ids: Tensor
    mask: Tensor
    positions: Positions


class Walk:
    """A model that runs layer by layer over given examples.

    Attributes:
        weights: the weights of the model.
        dtype: type of the states.
        device: device that computes.
    """

    def __init__(self, weights: Weights, batches: Sequence[Mapping[str, Tensor]], device: str, attention: str) -> None:
        """Build the model without weights.

        Args:
            weights: the weights of the model.
            batches: batches of `losses.batches`. They are padded on the right.
            device: device that computes, `cpu` or `cuda`.
            attention: attention implementation of transformers.
        """
        ref = weights.ref
        model = streaming.build(ref.base, ref.dtype, attn_implementation=attention)
        self.dtype, self.device = ref.dtype, torch.device(device)
        self.weights, self._decoder, self._head = weights, model.get_decoder(), model.get_output_embeddings()
        self._layers, self._norm = list(self._decoder.layers), self._decoder.norm
        self._decoder.layers = nn.ModuleList(_Passed() for _ in self._layers)
        self._decoder.norm = nn.Identity()
        for layer in self._layers:
            for name in EXPERT_WEIGHTS:
                layer.mlp.experts.register_parameter(name, None)
        self._batches = [self._place(batch["input_ids"], batch["attention_mask"]) for batch in batches]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._layers)

    @torch.no_grad()
    def embed(self) -> Tensor:
        """Return the states before the first layer, (N, H)."""
        embedding = self._decoder.embed_tokens
        with self._filled(embedding, EMBEDDING.removesuffix("weight")):
            return torch.cat([embedding(batch.ids[batch.positions]) for batch in self._batches])

    @contextmanager
    def layer(self, number: int) -> Iterator["Layer"]:
        """Load a layer without the weights of its experts. It is freed at the end of the `with` block."""
        module = self._layers[number]
        with self._filled(module, in_layer(number, "")), torch.no_grad():
            yield Layer(self, number, module)

    @contextmanager
    def head(self) -> Iterator[tuple[nn.Module, Tensor]]:
        """Load the last norm and the output embedding (V, H). They are freed at the end of the `with` block."""
        with ExitStack() as stack:
            stack.enter_context(self._filled(self._norm, FINAL_NORM.removesuffix("weight")))
            stack.enter_context(self._filled(self._head, HEAD.removesuffix("weight")))
            yield self._norm, self._head.weight

    def run(self, number: int, module: nn.Module, states: Tensor) -> Iterator[tuple[Positions, slice, Tensor]]:
        """Run the module of a layer within the decoder, batch by batch.

        Yields the positions of the batch's tokens, their place in `states` (N, H), and the module's output (B, T, H).
        """
        self._decoder.layers[number] = module
        try:
            first = 0
            for batch in self._batches:
                here = slice(first, first + len(batch.positions[0]))
                padded = states.new_zeros((*batch.ids.shape, states.shape[-1]))
                padded[batch.positions] = states[here]
                made = self._decoder(inputs_embeds=padded, attention_mask=batch.mask, use_cache=False)
                yield batch.positions, here, made.last_hidden_state
                first = here.stop
        finally:
            self._decoder.layers[number] = _Passed()

    def _place(self, ids: Tensor, mask: Tensor) -> _Batch:
        rows, columns = (each.to(self.device) for each in mask.nonzero(as_tuple=True))
        return _Batch(ids.to(self.device), mask.to(self.device), (rows, columns))

    @contextmanager
    def _filled(self, module: nn.Module, prefix: str) -> Iterator[None]:
        """Give the parameters of a module their values, and make them hollow again at the end."""
        hollow = dict(module.named_parameters())
        try:
            for name in hollow:
                values = self.weights.read_trained(prefix + name).to(self.device, self.dtype)
                _set(module, name, nn.Parameter(values, requires_grad=False))
            yield
        finally:
            for name, parameter in hollow.items():
                _set(module, name, parameter)


class Layer:
    """A layer whose weights are in memory, except those of its experts."""

    def __init__(self, walk: Walk, number: int, module: Any) -> None:
        self._walk, self._number, self._module = walk, number, module

    def attend(self, states: Tensor) -> Routed:
        """Run attention and router. `states` are those before the layer, (N, H)."""
        module, mlp = self._module, self._module.mlp
        residual, found = torch.empty_like(states), []
        recorder = module.mlp = _Recorder()
        try:
            for positions, here, made in self._walk.run(self._number, module, states):
                residual[here] = made[positions]
                inputs = recorder.inputs[positions]
                _, shares, chosen = mlp.router(inputs)
                found.append((inputs, shares, chosen))
        finally:
            module.mlp = mlp
        inputs, shares, chosen = (torch.cat(each) for each in zip(*found, strict=True))
        return _route(residual, inputs, shares, chosen, mlp.experts.num_experts)

    def gate_up(self, expert: int, inputs: Tensor, weight: Tensor) -> Tensor:
        """Compute the inputs of an expert's down_proj, (n, I), from its inputs (n, H) and its weight (H, 2 I)."""
        return self._module.mlp.experts._apply_gate(self._project(GATE_UP, expert, inputs, weight))

    def down(self, expert: int, gated: Tensor, weight: Tensor) -> Tensor:
        """Compute the output of an expert, (n, H), from the result of `gate_up` and its weight (I, H)."""
        return self._project(DOWN, expert, gated, weight)

    def _project(self, name: str, expert: int, inputs: Tensor, weight: Tensor) -> Tensor:
        bias = self._module.mlp.experts.get_parameter(name + BIAS_SUFFIX)
        return inputs @ weight.to(inputs.dtype) + bias[expert]


class _Passed(nn.Module):
    """Takes the place of a layer that does not run."""

    def forward(self, states: Tensor, **_: Any) -> Tensor:
        return states


class _Recorder(nn.Module):
    """Takes the place of a layer's MLP: keeps its inputs (B, T, H) and returns zeros."""

    inputs: Tensor

    def forward(self, states: Tensor) -> tuple[Tensor, None]:
        self.inputs = states
        return torch.zeros_like(states), None


def _route(residual: Tensor, inputs: Tensor, shares: Tensor, chosen: Tensor, experts: int) -> Routed:
    """Sort the tokens by their experts. Shapes: `shares` and `chosen` (N, K). The host waits for the device once."""
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=experts).tolist()
    tokens = order // chosen.shape[1]
    return Routed(residual, inputs, tokens.split(counts), shares.flatten()[order].split(counts))


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, parameter)
