"""Distil: train the quantized model on the fine-tuned model's predictions, in addition to the data.

The loss of a supervised token is (1 - weight) * cross entropy + weight * T^2 * KL(teacher_T || student_T). The
temperature T softens both distributions. The factor T^2 keeps the size of the gradient roughly independent of T (Hinton
et al. 2015, arXiv:1503.02531, section 2).

Logits exist only for one chunk of tokens at a time (see `models.chunked_logits`).

Legend: B = examples of the batch, T = positions, V = size of the vocabulary, N = supervised tokens of the batch,
n = supervised tokens of a chunk.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import DistillationConfig, Method, QatConfig
from pipeline.data.harmony import IGNORED
from pipeline.models import chunked_logits, fake_quantizers
from pipeline.models.adapters import SavedAdapters
from pipeline.models.chunked_logits import Positions, States
from pipeline.models.loading import TRAIN_DTYPES
from pipeline.models.references import ModelRef


@dataclass(frozen=True)
class Teacher:
    """The model that the student learns from, and the settings of distillation.

    Attributes:
        model: a causal language model in evaluation mode. It is not trained. If it is None, the student itself computes
            the teacher's predictions, inside `as_teacher`.
        weight: share of the divergence in the loss, greater than 0 and at most 1.
        temperature: softmax temperature of teacher and student in the loss.
        as_teacher: function that takes the student and returns a context manager. Inside this context, the student
            computes the teacher's predictions.
    """

    model: nn.Module | None
    weight: float
    temperature: float
    as_teacher: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class DistillationLoss:
    """Sums of loss and divergence over the supervised tokens of a batch.

    Attributes:
        loss: the distillation loss. Gradients flow through it.
        divergence: KL(teacher || student) in nats, always at temperature 1.
    """

    loss: Tensor
    divergence: Tensor


def holds_second_model(qat: QatConfig, sft_dtype: torch.dtype, *, has_own_base: bool = False) -> bool:
    """Return whether the teacher is a second model in memory.

    With LoRA, student and teacher have the same base if QAT uses the type in which SFT saved its model. Then the
    student itself acts as the teacher: it runs with SFT's adapters and without quantizers. Only SFT's adapters take
    additional memory.

    Args:
        qat: settings of QAT.
        sft_dtype: type in which SFT saved its model.
        has_own_base: whether `quantize` wrote a rounded base for QAT.
    """
    shares_base = not has_own_base and qat.method is Method.lora and TRAIN_DTYPES[qat.precision] == sft_dtype
    return bool(qat.distillation.weight) and not shares_base


def share_base(sft: ModelRef, settings: DistillationConfig) -> Teacher:
    """Make a teacher out of the student's base and the adapters of SFT.

    If SFT trained all weights, there are no adapters, and the base is the model that SFT saved.

    The student must have the base of `sft`. The student's frozen weights must not be rounded in place.
    """
    saved = SavedAdapters(sft.directory if sft.adapter else None)

    @contextmanager
    def as_teacher(student: nn.Module) -> Iterator[None]:
        with saved.replace_own(student), fake_quantizers.switched_off(student):
            yield

    return Teacher(None, settings.weight, settings.temperature, as_teacher)


def distill(student: nn.Module, teacher: Teacher, batch: dict[str, Tensor]) -> DistillationLoss:
    """Compute the distillation loss of a batch.

    Args:
        student: the model that is trained.
        teacher: the model to learn from.
        batch: labels (B, T) and the inputs of both models.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "use_cache")}
    # The logits at each position predict the next token.
    supervised = chunked_logits.find_positions(functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1)))
    targets = batch["labels"].roll(-1, dims=1)[supervised]
    student_states = chunked_logits.compute_states(student, inputs, supervised)
    teacher_states = compute_teacher_states(student, teacher, inputs, supervised)
    return sum_losses(student_states, teacher_states, targets, weight=teacher.weight, temperature=teacher.temperature)


@torch.no_grad()
def compute_teacher_states(
    student: nn.Module, teacher: Teacher, inputs: Mapping[str, object], positions: Positions
) -> States:
    """Run the teacher up to its head. See `chunked_logits.compute_states` for `inputs` and `positions`."""
    if teacher.model is not None:
        return chunked_logits.compute_states(teacher.model, inputs, positions)
    is_training = student.training
    student.eval()
    try:
        with teacher.as_teacher(student):
            return chunked_logits.compute_states(student, inputs, positions)
    finally:
        student.train(is_training)


def sum_losses(
    student: States, teacher: States, targets: Tensor, *, weight: float, temperature: float
) -> DistillationLoss:
    """Sum the distillation loss over the supervised tokens.

    Args:
        student: states of the model that is trained, at the supervised positions.
        teacher: states of the teacher at the same positions.
        targets: id of the token after each position, shape (N).
        weight: share of the divergence in the loss.
        temperature: softmax temperature of teacher and student in the loss.
    """
    loss, divergence = torch.zeros((), device=targets.device), torch.zeros((), device=targets.device)
    sum_chunk = partial(_sum_chunk, weight=weight, temperature=temperature)
    for chunk_loss, chunk_divergence in chunked_logits.map_chunks(sum_chunk, (student, teacher), targets):
        loss, divergence = loss + chunk_loss, divergence + chunk_divergence
    return DistillationLoss(loss, divergence.detach())


def _sum_chunk(
    student: Tensor, teacher: Tensor, targets: Tensor, *, weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Sum loss and divergence over a chunk.

    `student` and `teacher` are logits with the shape (n, V). `targets` has the shape (n).
    """
    cross_entropy = functional.cross_entropy(student, targets, reduction="sum")
    softened = _sum_divergence(student / temperature, teacher / temperature) * temperature**2
    with torch.no_grad():
        divergence = _sum_divergence(student, teacher)
    return (1 - weight) * cross_entropy + weight * softened, divergence


def _sum_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    return functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
