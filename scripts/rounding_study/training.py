"""Trains models as the program does: AdamW, warm-up and cosine schedule, clipped gradients, one rounding per step."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, get_scheduler

from pipeline.config import TrainConfig
from pipeline.data.harmony import IGNORED
from pipeline.models import fake_quantizers
from pipeline.models.rounded_weights import RoundedWeights
from pipeline.training.distillation import Teacher, distill
from scripts.rounding_study.task import Rows


def train(
    model: PreTrainedModel,
    rows: Rows,
    *,
    steps: int,
    rate: float,
    batch: int,
    seed: int,
    teacher: Teacher | None = None,
    balances_experts: bool = False,
) -> None:
    """Train a model in place. The same seed gives the same batches.

    Args:
        model: model from `models.prepare`. If it has quantizers, the forward pass rounds.
        rows: training data.
        steps: optimizer steps.
        rate: peak learning rate.
        batch: rows of a batch.
        seed: seed of the order of the rows.
        teacher: teacher of distillation, or None.
        balances_experts: whether the loss has the router's balancing term.
    """
    defaults = TrainConfig()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=defaults.weight_decay, fused=True)
    schedule = get_scheduler(defaults.lr_scheduler, optimizer, math.ceil(defaults.warmup_ratio * steps), steps)
    rounded = _keep_rounded(model)
    model.train()
    for data in _draw(rows, steps, batch, seed):
        loss = _loss(model, data, teacher, balances_experts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, defaults.max_grad_norm)
        optimizer.step()
        schedule.step()
        if rounded is not None:
            rounded.forget()
    model.eval()


def _keep_rounded(model: PreTrainedModel) -> RoundedWeights | None:
    if not any(True for _ in fake_quantizers.find_enabled(model)):
        return None
    return fake_quantizers.keep_rounded(model, math.inf)


def _loss(model: PreTrainedModel, data: dict[str, Tensor], teacher: Teacher | None, balances_experts: bool) -> Tensor:
    tokens = int((data["labels"] != IGNORED).sum())
    if teacher is not None:
        return distill(model, teacher, data).loss / tokens
    if balances_experts:
        return model(**data, use_cache=False, output_router_logits=True).loss
    logits = model(data["input_ids"], attention_mask=data["attention_mask"], use_cache=False).logits
    targets = data["labels"][:, 1:].flatten()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED)


def _draw(rows: Rows, steps: int, batch: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches. Each epoch has a new order. An incomplete batch at the end of an epoch is left out."""
    generator = torch.Generator().manual_seed(seed)
    order: list[Tensor] = []
    for _ in range(steps):
        if not order:
            order = [each for each in torch.randperm(len(rows), generator=generator).split(batch) if len(each) == batch]
        yield rows.batch(order.pop())
