"""Logits in chunks: the product with the output embedding (the head), for a few chosen tokens at a time.

The logits of all positions would be the largest tensor: 3.3 GB in BF16 for 8,192 tokens and a vocabulary of 201,088.
Losses and divergences reduce them to a few numbers per token. So the forward pass stops before the head, and
`map_chunks` computes, reduces and frees the logits of CHUNK tokens at a time. For gradients, it computes them again in
the backward pass. A trained head under ZeRO-3 is the exception: it computes all logits in its own forward pass.

Legend: B batch, T positions, H hidden size, V vocabulary, N chosen positions, n <= CHUNK of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pipeline.models.sharding import gather, is_kept_from_gradients

CHUNK = 512  # tokens; their float32 logits take 0.4 GB for a vocabulary of 201,088

T = TypeVar("T")


@dataclass(frozen=True)
class States:
    """The factors of a model's logits at chosen positions.

    Attributes:
        hidden: (N, H) hidden states of the chosen positions.
        head: (V, H) weight of the output embedding, possibly sharded. If it is None, `hidden` are the logits (N, V).
    """

    hidden: Tensor
    head: Tensor | None


def compute_states(model: nn.Module, inputs: Mapping[str, object], chosen: Tensor) -> States:
    """Run a model up to its head.

    Args:
        model: a causal language model, possibly wrapped (adapters, DDP, FSDP2, DeepSpeed). The wrapper is called, so
            that it takes part in the forward pass.
        inputs: the model's inputs, without labels.
        chosen: (B, T) booleans, the positions whose logits are needed.
    """
    causal = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    embedding = causal.get_output_embeddings()
    if torch.is_grad_enabled() and is_kept_from_gradients(embedding.weight):
        positions = chosen.any(dim=0).nonzero().flatten()
        logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits
        return States(logits[chosen[:, positions]], None)
    found: list[Tensor] = []
    hook = causal.get_decoder().register_forward_hook(lambda *call: found.append(call[-1].last_hidden_state))
    try:
        # One position goes through the head as usual, so that its hooks (FSDP2, quantizers) run.
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return States(found[0][chosen], embedding.weight)  # read now, because FSDP2 replaces it during a forward pass


def map_chunks(function: Callable[..., T], models: Sequence[States], *others: Tensor) -> Iterator[T]:
    """Apply a function to the logits of each chunk of positions, in order. No positions give one empty chunk.

    Gradients flow to the hidden states and heads of `models`. The weights of heads must stay in place until the
    backward pass is over. A sharded head is gathered once. This is a collective: all processes must enter and finish
    together.

    Args:
        function: takes the float32 logits (n, V) of each model, then the chunk (n, ...) of each of `others`. It is
            called again in the backward pass.
        models: the states of the models at the same positions, in the order of the function's arguments.
        others: (N, ...) further values for each position.
    """
    with ExitStack() as stack:
        heads = [None if model.head is None else stack.enter_context(gather(model.head)) for model in models]
        for part in zip(
            *(tensor.split(CHUNK) for tensor in (*(model.hidden for model in models), *others)), strict=True
        ):
            hidden, rest = part[: len(models)], part[len(models) :]
            yield checkpoint(_apply, function, heads, hidden, rest, use_reentrant=False, preserve_rng_state=False)


def _apply(
    function: Callable[..., T], heads: list[Tensor | None], hidden: Sequence[Tensor], others: Sequence[Tensor]
) -> T:
    products = (
        part if head is None else functional.linear(part, head) for part, head in zip(hidden, heads, strict=True)
    )
    return function(*(logits.float() for logits in products), *others)
