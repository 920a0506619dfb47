"""Measures a model on held-out rows, and compares its predictions with a reference's.

Where the distribution of the next token is known, the loss is its expected value. A draw of tokens would add noise,
which is larger than the effect of rounding.

Legend: N = supervised tokens, V = size of the vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from pipeline.data.harmony import IGNORED
from scripts.rounding_study.task import VOCABULARY, Rows

_BATCH = 256


@dataclass(frozen=True)
class Predictions:
    """Predictions at the supervised positions.

    Attributes:
        log_probs: log-probabilities of the model, (N, V).
        chances: probabilities of the tokens in the data, (N, V).
    """

    log_probs: Tensor
    chances: Tensor

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a supervised token, in nats."""
        return -float((self.chances * self.log_probs).sum(dim=-1).mean())

    @property
    def entropy(self) -> float:
        """The lowest loss that any model can have, in nats per supervised token."""
        return float(torch.special.entr(self.chances).sum(dim=-1).mean())

    def divergence_from(self, reference: "Predictions") -> float:
        """Return KL(reference || self) in nats, as the mean over supervised tokens."""
        products = reference.log_probs.exp() * (reference.log_probs - self.log_probs)
        return float(products.double().sum(dim=-1).mean())


@torch.no_grad()
def predict(model: PreTrainedModel, rows: Rows, chances: Tensor | None = None) -> Predictions:
    """Compute a model's predictions. Quantizers that are enabled round.

    Args:
        model: the model.
        rows: held-out rows.
        chances: result of `expect_tokens` for these rows. None takes the tokens of the rows as certain.
    """
    model.eval()
    found = []
    for data in rows.batches(_BATCH):
        logits = model(data["input_ids"], attention_mask=data["attention_mask"], use_cache=False).logits[:, :-1]
        found.append(logits[data["labels"][:, 1:] != IGNORED].double().log_softmax(dim=-1))
    if chances is None:
        chances = functional.one_hot(rows.labels[rows.labels != IGNORED], VOCABULARY).double()
    return Predictions(torch.cat(found), chances.flatten(0, -2))
