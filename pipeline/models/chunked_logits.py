"""A model's last product, hidden states times vocabulary, for a few tokens at a time and only where it is wanted.

The logits of all positions are the largest tensor there is: 3.3 GB in BF16 for 8,192 tokens and a vocabulary of
201,088. What is computed of them (losses, divergences) is a few numbers a token. So the forward pass leaves out the
product, and `in_chunks` makes the logits of CHUNK tokens, hands them on, and lets them go; where gradients are wanted,
it makes them once more in the backward pass. Under ZeRO-3 a head that is trained has to make them all by itself.

Legend: B batch, T positions, H hidden size, V vocabulary, N chosen positions, n up to CHUNK of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pipeline.models.sharding import gathered, is_kept_from_gradients

CHUNK = 512  # tokens whose float32 logits are held at once: 0.4 GB for a vocabulary of 201,088

T = TypeVar("T")


@dataclass(frozen=True)
class States:
    """What a model's logits at chosen positions are made of.

    Attributes:
        hidden: (N, H), of the chosen positions.
        head: the output embedding's weight (V, H), a process's part of it where it is sharded. None: `hidden` are the
            logits (N, V) themselves.
    """

    hidden: Tensor
    head: Tensor | None


def states(model: Any, inputs: dict[str, Any], chosen: Tensor) -> States:
    """Run a model up to its head.

    Args:
        model: a causal language model, as it is or wrapped (adapters, DDP, FSDP2, DeepSpeed). What is called is the
            wrapper, whose part in the forward pass is not left out.
        inputs: what it takes, without labels.
        chosen: (B, T) booleans.
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
        # One position goes through the head as usual: what hangs on it (FSDP2, quantizers) is to see it run.
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return States(found[0][chosen], embedding.weight)  # now: FSDP2 has another one while a pass is under way


def in_chunks(of_logits: Callable[..., T], models: Sequence[States], *others: Tensor) -> Iterator[T]:
    """What `of_logits` makes of every CHUNK of the chosen positions, in order; of no positions, one empty chunk.

    Gradients flow to the hidden states and heads of `models`, whose weights have to stay where they are until the
    backward pass is over. A sharded head is gathered once, so that all processes have to enter and to finish together.

    Args:
        of_logits: of the float32 logits (n, V) of each model and the others' parts (n, …); called again in the backward
            pass.
        models: in the order in which it takes their logits, of the same positions.
        others: (N, …), what else there is of each position.
    """
    with ExitStack() as stack:
        heads = [None if model.head is None else stack.enter_context(gathered(model.head)) for model in models]
        for part in zip(
            *(tensor.split(CHUNK) for tensor in (*(model.hidden for model in models), *others)), strict=True
        ):
            hidden, rest = part[: len(models)], part[len(models) :]
            yield checkpoint(_applied, of_logits, heads, hidden, rest, use_reentrant=False, preserve_rng_state=False)


def _applied(
    of_logits: Callable[..., T], heads: list[Tensor | None], hidden: Sequence[Tensor], others: Sequence[Tensor]
) -> T:
    products = (
        part if head is None else functional.linear(part, head) for part, head in zip(hidden, heads, strict=True)
    )
    return of_logits(*(logits.float() for logits in products), *others)
