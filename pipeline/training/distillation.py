"""Distillation: the quantized model learns from what the fine-tuned one predicts, not from the data alone.

The loss of a supervised token is (1 - weight) * cross entropy + weight * T^2 * KL(teacher_T || student_T), where both
distributions are softened by the temperature T; T^2 keeps the size of the gradient (Hinton et al. 2015,
arXiv:1503.02531, section 2).

Neither model's logits are there for more than a few tokens at a time (see `head`).

Legend: B batch, T positions, V vocabulary, N supervised tokens of the batch, n of them in a chunk.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.data.harmony import IGNORED
from pipeline.models import chunked_logits
from pipeline.models.chunked_logits import States


@dataclass(frozen=True)
class Teacher:
    """Who is learnt from, and how much.

    Attributes:
        model: a causal language model in evaluation mode; it is not trained.
        weight: share of the loss, above 0, up to 1.
        temperature: of both distributions.
    """

    model: Any
    weight: float
    temperature: float


@dataclass(frozen=True)
class Distilled:
    """Sums over the supervised tokens of a batch: the loss, with its gradient, and the divergence in nats at T = 1."""

    loss: Tensor
    divergence: Tensor


def distilled(student: Any, teacher: Teacher, batch: dict[str, Tensor]) -> Distilled:
    """Run both models on a batch: labels (B x T), and what a model takes beside them."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "use_cache")}
    supervised = functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))  # at each position, of the token after it
    targets = batch["labels"].roll(-1, dims=1)[supervised]
    own = chunked_logits.compute_states(student, inputs, supervised)
    with torch.no_grad():
        taught = chunked_logits.compute_states(teacher.model, inputs, supervised)
    return sums(own, taught, targets, teacher.weight, teacher.temperature)


def sums(own: States, taught: States, targets: Tensor, weight: float, temperature: float) -> Distilled:
    """From what student and teacher make their logits of, and the tokens that follow (N)."""
    loss, divergence = torch.zeros((), device=targets.device), torch.zeros((), device=targets.device)
    of_part = partial(_sums, weight=weight, temperature=temperature)
    for part_loss, part_divergence in chunked_logits.map_chunks(of_part, (own, taught), targets):
        loss, divergence = loss + part_loss, divergence + part_divergence
    return Distilled(loss, divergence.detach())


def _sums(own: Tensor, taught: Tensor, targets: Tensor, weight: float, temperature: float) -> tuple[Tensor, Tensor]:
    """From logits (n, V) of both and targets (n)."""
    cross_entropy = functional.cross_entropy(own, targets, reduction="sum")
    softened = _divergence(own / temperature, taught / temperature) * temperature**2
    with torch.no_grad():
        divergence = _divergence(own, taught)
    return (1 - weight) * cross_entropy + weight * softened, divergence


def _divergence(own: Tensor, taught: Tensor) -> Tensor:
    return functional.kl_div(own.log_softmax(-1), taught.log_softmax(-1), reduction="sum", log_target=True)
