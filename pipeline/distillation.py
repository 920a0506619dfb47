"""Distillation: the quantized model learns from what the fine-tuned one predicts, not from the data alone.

The loss of a supervised token is (1 - weight) * cross entropy + weight * T^2 * KL(teacher_T || student_T), where both
distributions are softened by the temperature T; T^2 keeps the size of the gradient (Hinton et al. 2015,
arXiv:1503.02531, section 2).

Legend: B batch, T positions, V vocabulary, N supervised tokens of the batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipeline.harmony import IGNORED

_CHUNK = 512  # tokens whose float32 distributions are held at once: 0.8 GB for a vocabulary of 201,088


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
    labels = batch["labels"][:, 1:]
    supervised = labels != IGNORED
    own = _logits(student, batch)[:, :-1][supervised]  # (N, V)
    with torch.no_grad():
        taught = _logits(teacher.model, batch)[:, :-1][supervised]
    return sums(own, taught, labels[supervised], teacher.weight, teacher.temperature)


def sums(own: Tensor, taught: Tensor, targets: Tensor, weight: float, temperature: float) -> Distilled:
    """From the logits of student and teacher (N, V) and the tokens that follow (N)."""
    loss, divergence = own.new_zeros((), dtype=torch.float32), own.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets), _CHUNK):
        part = slice(start, start + _CHUNK)
        # Recomputed in the backward pass: else the distributions of every chunk would be held for it.
        of_part = checkpoint(_sums, own[part], taught[part], targets[part], weight, temperature, use_reentrant=False)
        loss, divergence = loss + of_part[0], divergence + of_part[1]
    return Distilled(loss, divergence.detach())


def _sums(own: Tensor, taught: Tensor, targets: Tensor, weight: float, temperature: float) -> tuple[Tensor, Tensor]:
    own, taught = own.float(), taught.float()
    cross_entropy = functional.cross_entropy(own, targets, reduction="sum")
    softened = _divergence(own / temperature, taught / temperature) * temperature**2
    with torch.no_grad():
        divergence = _divergence(own, taught)
    return (1 - weight) * cross_entropy + weight * softened, divergence


def _divergence(own: Tensor, taught: Tensor) -> Tensor:
    return functional.kl_div(own.log_softmax(-1), taught.log_softmax(-1), reduction="sum", log_target=True)


def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
