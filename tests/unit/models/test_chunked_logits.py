"""Logits in chunks give the same loss and gradients as all logits at once. No tensor holds all logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import gpt_oss
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.data.harmony import IGNORED
from pipeline.models import chunked_logits, losses
from pipeline.training import distillation
from pipeline.training.distillation import Teacher

VOCABULARY, ROWS, TOKENS = 997, 3, 50


def model(seed: int) -> Any:
    return gpt_oss(VOCABULARY, seed)


def batch() -> dict[str, Tensor]:
    """Make rows with prompts of 5, 10 and 15 tokens. The last row has 8 tokens of padding."""
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row in range(ROWS):
        labels[row, : 5 * (row + 1)] = IGNORED
    labels[-1, -8:], mask[-1, -8:] = IGNORED, 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def whole_loss(student: Any, teacher: Any, weight: float, temperature: float) -> Tensor:
    """Compute the distillation loss from the logits of all positions, with torch's own functions."""
    made = batch()
    labels = made.pop("labels")[:, 1:]
    own, taught = (each(**made).logits[:, :-1][labels != IGNORED] for each in (student, teacher))
    cross_entropy = functional.cross_entropy(own, labels[labels != IGNORED], reduction="sum")
    first, second = (torch.distributions.Categorical(logits=each / temperature) for each in (taught.detach(), own))
    divergence = torch.distributions.kl_divergence(first, second).sum()
    return (1 - weight) * cross_entropy + weight * temperature**2 * divergence


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_logits, "CHUNK", 8)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("how", ["plain", "adapted", "split by ZeRO-3"])
def test_loss_and_gradients_are_the_same_as_with_all_logits_at_once(how: str) -> None:
    found = []
    for of in (lambda each: distillation.distill(each, Teacher(model(1), 0.5, 2.0), batch()).loss, None):
        student = model(0)
        if how == "adapted":
            torch.manual_seed(2)
            student = get_peft_model(student, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        if how == "split by ZeRO-3":
            student.get_output_embeddings().weight.ds_id = 0  # marks the weight as sharded: only its module may use it
        loss = of(student) if of else whole_loss(student, model(1), 0.5, 2.0)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}))
    (loss, gradients), (expected_loss, expected) = found
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == expected.keys()
    largest_gradient = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6 * largest_gradient)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("is_split", [False, True], ids=["plain", "split by ZeRO-3"])
def test_a_batch_with_nothing_supervised_has_a_loss_of_zero_with_gradients(is_split: bool) -> None:
    student, made = model(0), batch()
    if is_split:
        student.get_output_embeddings().weight.ds_id = 0
    made["labels"][:] = IGNORED
    loss = distillation.distill(student, Teacher(model(1), 0.5, 1.0), made).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in student.parameters() if p.grad is not None)


@torch.no_grad()
@pytest.mark.usefixtures("small_chunks")
def test_validation_loss_is_the_mean_of_torchs_cross_entropy() -> None:
    own, made = model(0).eval(), batch()
    labels = made.pop("labels")
    logits = own(**made).logits[:, :-1].transpose(1, 2)
    supervised = functional.cross_entropy(logits, labels[:, 1:], ignore_index=IGNORED)
    targets = made["input_ids"].masked_fill(made["attention_mask"] == 0, IGNORED)[:, 1:]
    found = losses.measure(own, [batch()])
    assert found.supervised == pytest.approx(float(supervised), rel=1e-6)
    assert found.over_all == pytest.approx(float(functional.cross_entropy(logits, targets)), rel=1e-6)


class Largest(TorchDispatchMode):
    """Watches all floating-point tensors that are made. Records how many values the largest one has."""

    values = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.values = max(self.values, tensor.numel())
        return made


@contextmanager
def largest() -> Iterator[Largest]:
    with Largest() as seen:
        yield seen


@pytest.mark.usefixtures("small_chunks")
def test_no_tensor_of_tokens_times_vocabulary_is_made_forward_or_backward() -> None:
    student, teacher = model(0), Teacher(model(1), 0.5, 2.0)
    weights = max(p.numel() for p in student.parameters())
    with largest() as seen:
        distillation.distill(student, teacher, batch()).loss.backward()
        losses.measure(student, [batch()])
    assert seen.values == weights < ROWS * TOKENS * VOCABULARY / 4
    with largest() as seen:
        whole_loss(student, teacher.model, 0.5, 2.0)
    assert seen.values == ROWS * TOKENS * VOCABULARY


def test_the_head_gets_contiguous_inputs() -> None:
    """For strided inputs in BF16, a CPU would copy the head for each row of the batch."""
    student = model(0)
    seen: list[bool] = []
    student.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    made = batch()
    inputs = {name: value for name, value in made.items() if name != "labels"}
    with torch.no_grad():
        positions = chunked_logits.find_positions(torch.ones_like(made["input_ids"], dtype=torch.bool))
        chunked_logits.compute_states(student, inputs, positions)
    assert seen == [True]
