"""Signs of failed training in the lines of metrics.jsonl. Each test of a sign has a healthy counterpart."""

from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.config import QatConfig
from pipeline.training.symptoms import ROUTED, UNUSED, find_symptoms, warn_of_symptoms

HEALTHY = (5.0, 4.6, 4.9, 4.1, 4.3, 3.9, 4.0, 3.5, 3.8)


def lines(
    training: Sequence[float] = HEALTHY,
    validation: Sequence[float] = (5.0, 4.4, 3.9),
    gradients: Sequence[float] = (),
    last: dict[str, Any] | None = None,
    first: dict[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Return lines of a run. `first` and `last` change the first and the last validation."""
    usual = {"eval_moved_weights": 0.4, "eval_changed_codes": 0.1, UNUSED: 0, ROUTED: 500.0}
    found: list[dict[str, float]] = [{"step": i, "eval_loss": loss, **usual} for i, loss in enumerate(validation)]
    found[0] |= {"eval_moved_weights": 0.0, "eval_changed_codes": 0.0, **(first or {})}
    found[-1] |= last or {}
    norms = [*gradients, *[1.0] * (len(training) - len(gradients))]
    return found + [
        {"step": i + 1, "loss": loss, "grad_norm": norm}
        for i, (loss, norm) in enumerate(zip(training, norms, strict=True))
    ]


def symptoms(*given: Any, stage: str = "qat", **more: Any) -> list[str]:
    return find_symptoms(lines(*given, **more), stage, QatConfig())


def only(found: list[str]) -> str:
    (message,) = found
    return message


def test_healthy_training_has_no_symptom(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_symptoms(lines(), "qat", QatConfig())
    assert symptoms() == symptoms(stage="sft") == []
    assert capsys.readouterr().err == ""


def test_each_symptom_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_symptoms(lines(gradients=[0.0]), "qat", QatConfig())
    assert capsys.readouterr().err.startswith("[qat] warning: the gradient was zero at 1 of 9 logged steps")


def test_zero_gradients_are_counted_and_placed() -> None:
    assert "zero at 2 of 9 logged steps, first at step 2" in only(symptoms(gradients=[1.0, 0.0, 0.0]))


def test_a_constant_validation_loss_is_reported() -> None:
    assert "the validation loss stayed at 5: training had no effect" in only(symptoms(validation=[5.0, 5.0, 5.0]))
    assert symptoms(validation=[5.0, 5.0, 4.9999]) == []


def test_a_constant_training_loss_is_reported() -> None:
    assert "the training loss was 5 at every logged step" in only(symptoms(training=[5.0] * 9))
    assert symptoms(training=[5.0]) == []


def test_a_rising_training_loss_is_reported() -> None:
    assert "the training loss rose over the run, to 5.5" in only(symptoms(training=[*reversed(HEALTHY), 5.5]))


def test_noise_is_not_a_rise() -> None:
    assert symptoms(training=[4.0, 5.0, 3.0, 4.5, 3.5, 4.0, 4.8, 3.9, 4.3]) == []
    assert symptoms(training=[3.0, 5.0]) == []


def test_a_rising_validation_loss_is_reported_with_its_cause() -> None:
    rises = [3.9, 4.4, 5.0]
    assert "while the training loss fell: it memorizes" in only(symptoms(validation=rises))
    message = only(symptoms(training=[*reversed(HEALTHY), 5.5], validation=rises))
    assert "rose from 3.9000 to 5.0000. Lower qat.learning_rate=" in message
    assert symptoms(validation=[3.9, 3.95]) == []


def test_weights_that_do_not_move_are_reported() -> None:
    assert "none of the sampled expert weights" in only(symptoms(last={"eval_moved_weights": 0.0}))


def test_codes_that_do_not_change_are_reported_in_qat_alone() -> None:
    still = {"eval_changed_codes": 0.0}
    assert "none of the sampled 4-bit values" in only(symptoms(last=still))
    assert symptoms(last=still, stage="sft") == []


def test_bf16_values_that_do_not_change_are_reported() -> None:
    assert "none of the sampled BF16 values" in only(symptoms(last={"eval_changed_bf16_values": 0.0}))
    assert symptoms(last={"eval_changed_bf16_values": 0.01}) == []


def test_the_validation_before_training_alone_is_no_symptom() -> None:
    assert symptoms(validation=[5.0]) == []


def test_experts_that_lose_their_tokens_are_reported_with_advice() -> None:
    message = only(symptoms(last={UNUSED: 3}))
    assert "reached 3 experts, of all layers together (before training: 0)" in message
    assert "raise qat.router_aux_loss_coef" in message


def test_experts_that_never_had_tokens_need_other_examples() -> None:
    message = only(symptoms(first={UNUSED: 3}, last={UNUSED: 3}))
    assert "Use more varied examples" in message and "collapsing" not in message


def test_few_validation_tokens_say_nothing_about_experts() -> None:
    assert symptoms(first={ROUTED: 20.0}, last={UNUSED: 3, ROUTED: 20.0}) == symptoms(
        first={ROUTED: 20.0}, last={ROUTED: 20.0}
    )
