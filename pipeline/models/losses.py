"""Compute the validation loss, in the same way during training and in `evaluate`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, overload

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from pipeline.data.harmony import IGNORED
from pipeline.models import chunked_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Examples(Protocol):
    """A sequence of examples. Each example has the columns input_ids and labels."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Mapping[str, Sequence[int]]: ...


@dataclass(frozen=True)
class Loss:
    """Sums of negative log-likelihoods in nats, and the number of tokens in each sum.

    Attributes:
        supervised_sum: sum over the supervised tokens. Training minimizes the mean over these tokens.
        supervised_tokens: number of supervised tokens.
        all_sum: sum over every predicted token, including the prompt. TRL reports the mean over these tokens if labels
            are not masked.
        all_tokens: number of predicted tokens.
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
        """Exponential of the supervised loss, or infinity if the exponential overflows."""
        return math.exp(self.supervised) if self.supervised < 700 else math.inf


def batches(examples: Examples, batch_size: int, pad_token_id: int) -> Sequence[dict[str, Tensor]]:
    """Split examples (columns input_ids, labels) into batches, in order and padded on the right.

    Each batch has input_ids, attention_mask and labels. Their shape is (B, T). A batch is made only when it is read, so
    the batches of a large validation set are never all in memory.
    """
    return _Batches(examples, batch_size, pad_token_id)


@dataclass(frozen=True)
class _Batches(Sequence[dict[str, Tensor]]):
    examples: Examples
    batch_size: int
    pad_token_id: int

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
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


def measure(model: "PreTrainedModel", data: Iterable[dict[str, Tensor]]) -> Loss:
    """Compute the loss of a causal language model on the batches that `batches` returns."""
    return from_sums(sums(model, data))


def sums(model: "PreTrainedModel", data: Iterable[dict[str, Tensor]]) -> Tensor:
    """Compute the fields of a Loss. The results of several processes can be added. Returns (4,) float64."""
    return sums_by_example(model, data).sum(0)


@torch.no_grad()
def sums_by_example(model: "PreTrainedModel", data: Iterable[dict[str, Tensor]]) -> Tensor:
    """Compute the fields of a Loss for each example, in order. Returns (examples, 4) float64."""
    was_training = model.training
    model.eval()
    found = [_batch_sums(model, {key: value.to(model.device) for key, value in batch.items()}) for batch in data]
    model.train(was_training)
    return torch.cat([torch.zeros(0, 4, dtype=torch.float64), *found])


def from_sums(sums: Tensor) -> Loss:
    """Make a Loss from a tensor that has its four fields in order."""
    return Loss(float(sums[0]), int(sums[1]), float(sums[2]), int(sums[3]))


def _batch_sums(model: "PreTrainedModel", batch: dict[str, Tensor]) -> Tensor:
    """Compute the fields of a Loss for each example in a batch. Returns (B, 4) float64."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    real = functional.pad(batch["attention_mask"][:, 1:].bool(), (0, 1))  # True if the next token is not padding
    positions = chunked_logits.find_positions(real)
    targets, labels = (batch[name].roll(-1, dims=1)[positions] for name in ("input_ids", "labels"))
    states = chunked_logits.compute_states(model, inputs, positions)
    nll = torch.cat(list(chunked_logits.map_chunks(_negative_log_likelihoods, (states,), targets))).double().cpu()
    supervised, example = (labels != IGNORED).cpu(), positions[0].cpu()
    by_token = torch.stack([nll.where(supervised, 0.0), supervised.double(), nll, torch.ones_like(nll)], dim=1)
    return torch.zeros(len(real), 4, dtype=torch.float64).index_add_(0, example, by_token)


def _negative_log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, reduction="none")
