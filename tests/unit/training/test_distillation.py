"""The distillation loss agrees with torch's own losses, and its gradient is right."""

import math

import pytest
import torch
from torch.nn import functional

from pipeline.models import chunked_logits
from pipeline.models.chunked_logits import States
from pipeline.training import distillation
from pipeline.training.distillation import DistillationLoss


def logits(seed: int, tokens: int = 40, vocabulary: int = 11) -> torch.Tensor:
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


TARGETS = torch.arange(40) % 11


def sum_losses(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, *, weight: float, temperature: float
) -> DistillationLoss:
    """Call `distillation.sum_losses` with logits (N, V).

    The logits are passed as hidden states with an identity head.
    """
    models = (States(logits, torch.eye(11, dtype=logits.dtype)) for logits in (student, teacher))
    return distillation.sum_losses(*models, targets, weight=weight, temperature=temperature)


def test_without_weight_the_loss_is_cross_entropy() -> None:
    found = sum_losses(logits(0), logits(1), TARGETS, weight=0.0, temperature=1.0)
    torch.testing.assert_close(found.loss, functional.cross_entropy(logits(0), TARGETS, reduction="sum"))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_a_weight_of_one_the_loss_is_the_softened_divergence(temperature: float) -> None:
    found = sum_losses(logits(0), logits(1), TARGETS, weight=1.0, temperature=temperature)
    teacher, student = (torch.distributions.Categorical(logits=logits(seed) / temperature) for seed in (1, 0))
    expected = torch.distributions.kl_divergence(teacher, student).sum() * temperature**2
    torch.testing.assert_close(found.loss, expected)


def test_the_reported_divergence_is_at_temperature_one() -> None:
    found = sum_losses(logits(0), logits(1), TARGETS, weight=0.3, temperature=4.0)
    teacher, student = (torch.distributions.Categorical(logits=logits(seed)) for seed in (1, 0))
    torch.testing.assert_close(found.divergence, torch.distributions.kl_divergence(teacher, student).sum())


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient() -> None:
    student_logits = logits(0).requires_grad_()
    found = sum_losses(student_logits, logits(0), TARGETS, weight=1.0, temperature=2.0)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(0.0, abs=1e-5)
    assert student_logits.grad is not None and float(student_logits.grad.abs().max()) < 1e-6


def test_chunks_change_neither_loss_nor_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk in (7, 1000):
        monkeypatch.setattr(chunked_logits, "CHUNK", chunk)
        student_logits = logits(0).requires_grad_()
        loss = sum_losses(student_logits, logits(1), TARGETS, weight=0.5, temperature=2.0).loss
        loss.backward()
        results.append((loss.detach(), student_logits.grad))
    torch.testing.assert_close(results[0], results[1])


def test_a_batch_without_supervised_tokens_has_a_loss_of_zero() -> None:
    nothing = logits(0)[:0].requires_grad_()
    assert sum_losses(nothing, logits(1)[:0], TARGETS[:0], weight=0.5, temperature=1.0).loss.item() == 0.0


def test_bf16_logits_are_compared_in_float32() -> None:
    student_logits, teacher_logits = logits(0).bfloat16(), logits(1).bfloat16()
    found = sum_losses(student_logits, teacher_logits, TARGETS, weight=0.5, temperature=1.0)
    expected = sum_losses(student_logits.float(), teacher_logits.float(), TARGETS, weight=0.5, temperature=1.0)
    assert torch.equal(found.loss, expected.loss) and math.isfinite(float(found.loss))
