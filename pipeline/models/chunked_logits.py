"""Compute logits in chunks: multiply by the output embedding (the head) for only a few tokens at a time.

The logits of all positions would be the largest tensor of a step: 3.3 GB in BF16 for 8,192 tokens and a vocabulary of
201,088. But losses and divergences need only a few numbers per token. So the forward pass stops before the head, and
`map_chunks` computes, reduces and frees the logits of CHUNK tokens at a time. For gradients, `map_chunks` computes the
logits again in the backward pass. A trained head under ZeRO-3 is the exception: its own forward pass computes all
chosen logits at once.

Legend: B batch, T positions, H hidden size, V vocabulary, N chosen positions, n <= CHUNK positions in a chunk.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipeline.models.sharding import gather, is_kept_from_gradients

CHUNK = 512  # tokens; their float32 logits take 0.4 GB for a vocabulary of 201,088

T = TypeVar("T")

Positions = tuple[Tensor, Tensor]
"""Rows and columns of the chosen positions, in the order of the batch. Both have the shape (N) and the type int64."""


@dataclass(frozen=True)
class States:
    """Two factors whose product is a model's logits at chosen positions.

    Attributes:
        hidden: hidden states of the chosen positions, (N, H).
        head: weight of the output embedding, (V, H), possibly sharded. If it is None, `hidden` has the logits instead,
            with the shape (N, V).
    """

    hidden: Tensor
    head: Tensor | None


def find_positions(chosen: Tensor) -> Positions:
    """Return the positions that the mask `chosen` selects. The mask has the shape (B, T) and the type bool.

    The host waits for the GPU here, to learn the number of positions. If tensors were indexed with the mask itself, the
    host would wait at every use, and again in the backward pass. So convert each mask once.
    """
    rows, columns = chosen.nonzero(as_tuple=True)
    return rows, columns


def compute_states(model: nn.Module, inputs: Mapping[str, object], positions: Positions) -> States:
    """Run a model up to its head, and return the inputs of `map_chunks`.

    Args:
        model: a causal language model, possibly wrapped (adapters, DDP, FSDP2, DeepSpeed). The outermost
            wrapper is called, so that every wrapper takes part in the forward pass.
        inputs: the model's inputs, without labels.
        positions: the positions whose logits are needed.
    """
    from transformers import PreTrainedModel  # slow, and reports import this module without running a model

    causal = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    embedding = causal.get_output_embeddings()
    if torch.is_grad_enabled() and is_kept_from_gradients(embedding.weight):
        rows, columns = positions
        kept, places = columns.unique(return_inverse=True)
        logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
        return States(logits[rows, places], None)
    found: list[Tensor] = []
    hook = causal.get_decoder().register_forward_hook(lambda *call: found.append(call[-1].last_hidden_state))
    try:
        # One position goes through the head as usual, so that the head's hooks (FSDP2, quantizers) run. With
        # logits_to_keep=1, its input would be a strided view. On a CPU and in BF16, torch 2.13 would then copy the head
        # once for each row of the batch. A copy takes 1.2 GB for a vocabulary of 201,088.
        first = torch.zeros(1, dtype=torch.long, device=positions[0].device)
        model(**inputs, use_cache=False, logits_to_keep=first)
    finally:
        hook.remove()
    return States(found[0][positions], embedding.weight)  # read only now: FSDP2 replaces the weight in a forward pass


def map_chunks(function: Callable[..., T], models: Sequence[States], *others: Tensor) -> Iterator[T]:
    """Apply a function to the logits of each chunk of positions, in order.

    If there are no positions, the function gets one empty chunk. Gradients flow to the hidden states and heads of
    `models`. The head weights must stay in memory until the backward pass is over. A sharded head is gathered once, by
    a collective call. So all processes must start and finish the iteration together.

    Args:
        function: function to apply. Its first arguments are the float32 logits of each model, (n, V). The next
            arguments are the chunks of the tensors in `others`, (n, ...). It is called again in the backward pass.
        models: states of each model at the same positions, in the order of the function's arguments.
        others: further tensors with one entry for each position, (N, ...).
    """
    with ExitStack() as stack:
        # Models may share a head, and DeepSpeed cannot gather a parameter that is gathered already.
        distinct = {id(model.head): model.head for model in models if model.head is not None}
        whole = {key: stack.enter_context(gather(head)) for key, head in distinct.items()}
        heads = [None if model.head is None else whole[id(model.head)] for model in models]
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
