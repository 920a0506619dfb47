"""Validation loss, defined once: training's early look and `evaluate` both call this."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from pipeline.data.harmony import IGNORED
from pipeline.models import chunked_logits


@dataclass(frozen=True)
class Loss:
    """Summed negative log-likelihoods in nats, and how many tokens they are of.

    `supervised` is over the tokens that training supervises, weighted by token: the loss that training minimizes.
    `all_tokens` is over every predicted token, prompt included: what TRL reports without masks.
    """

    supervised_sum: float = 0.0
    supervised_tokens: int = 0
    all_sum: float = 0.0
    all_tokens: int = 0

    @property
    def supervised(self) -> float:
        """Mean over supervised tokens."""
        return self.supervised_sum / self.supervised_tokens

    @property
    def over_all(self) -> float:
        """Mean over all predicted tokens."""
        return self.all_sum / self.all_tokens

    @property
    def perplexity(self) -> float:
        """exp of the supervised loss; infinite where that overflows."""
        return math.exp(self.supervised) if self.supervised < 700 else math.inf


def batches(examples: Any, batch_size: int, pad_token_id: int) -> Sequence[dict[str, Tensor]]:
    """Examples (columns input_ids, labels) in order, padded on the right: input_ids, attention_mask, labels (B, T).

    Each batch is made when it is asked for: a large validation set takes no memory.
    """
    return _Batches(examples, batch_size, pad_token_id)


@dataclass(frozen=True)
class _Batches(Sequence[dict[str, Tensor]]):
    examples: Any
    batch_size: int
    pad_token_id: int

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        start = range(len(self))[index] * self.batch_size
        part = [self.examples[i] for i in range(start, min(start + self.batch_size, len(self.examples)))]
        columns = {key: [torch.tensor(example[key]) for example in part] for key in ("input_ids", "labels")}
        return {
            "input_ids": pad_sequence(columns["input_ids"], batch_first=True, padding_value=self.pad_token_id),
            "labels": pad_sequence(columns["labels"], batch_first=True, padding_value=IGNORED),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in columns["input_ids"]], batch_first=True),
        }


def measure(model: Any, made: Iterable[dict[str, Tensor]]) -> Loss:
    """Loss of a causal language model on batches made by `batches`."""
    return from_sums(sums(model, made))


def sums(model: Any, made: Iterable[dict[str, Tensor]]) -> Tensor:
    """What a Loss is made of, as one float64 tensor (4,), so that processes can add theirs up."""
    return sums_by_example(model, made).sum(0)


@torch.no_grad()
def sums_by_example(model: Any, made: Iterable[dict[str, Tensor]]) -> Tensor:
    """The same of each example, in order: float64 (examples, 4)."""
    was_training = model.training
    model.eval()
    found = [_batch_sums(model, {key: value.to(model.device) for key, value in batch.items()}) for batch in made]
    model.train(was_training)
    return torch.cat([torch.zeros(0, 4, dtype=torch.float64), *found])


def from_sums(sums: Tensor) -> Loss:
    """(supervised sum, supervised tokens, sum, tokens) -> Loss."""
    return Loss(float(sums[0]), int(sums[1]), float(sums[2]), int(sums[3]))


def _batch_sums(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(B, 4) float64 of a batch."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    real = functional.pad(batch["attention_mask"][:, 1:].bool(), (0, 1))  # at each position, of the token after it
    targets, labels = (batch[name].roll(-1, dims=1)[real] for name in ("input_ids", "labels"))
    states = chunked_logits.states(model, inputs, real)
    nll = torch.cat(list(chunked_logits.in_chunks(_negative_log_likelihoods, (states,), targets))).double().cpu()
    supervised, example = (labels != IGNORED).cpu(), real.nonzero()[:, 0].cpu()
    of_token = torch.stack([nll.where(supervised, 0.0), supervised.double(), nll, torch.ones_like(nll)], dim=1)
    return torch.zeros(len(real), 4, dtype=torch.float64).index_add_(0, example, of_token)


def _negative_log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, reduction="none")
