"""Find signs of failed training in the lines of metrics.jsonl, and say what to do.

Training logs these lines in any case, so nothing here waits for a GPU. Steps before a resume count, too.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence

from pipeline.config import Stage, TrainConfig
from pipeline.runs.console import warn

UNUSED = "unused_experts"
"""Figure of a validation: number of experts, over all layers, that no token reached."""
ROUTED = "tokens_per_expert"
"""Figure of a validation: mean number of tokens that an expert got."""

MOST_RISE = 0.05
"""Smallest relative rise of a loss that is reported. A model whose validation loss rose further is not shipped."""

_LEAST_TOKENS = 100  # mean of all experts; below it, an expert without tokens may be an accident
_SAME = 1e-6  # largest relative difference of losses that count as equal
_LEAST_LINES = 6  # fewest training losses that show a rise
_ERRORS = 3.0  # a rise must also have so many standard errors

Line = Mapping[str, float]


def warn_of_symptoms(lines: Sequence[Line], stage: str, settings: TrainConfig) -> None:
    """Print a warning for each sign of failed training.

    Args:
        lines: lines of metrics.jsonl.
        stage: name of the stage.
        settings: section `sft` or `qat` of the configuration.
    """
    for message in find_symptoms(lines, stage, settings):
        warn(stage, message)


def find_symptoms(lines: Sequence[Line], stage: str, settings: TrainConfig) -> list[str]:
    """Describe each sign of failed training. The arguments are those of `warn_of_symptoms`."""
    training, validations = [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]
    rate = f"{stage}.learning_rate={settings.learning_rate}"
    return [
        *_gradients(training, stage),
        *_losses([line["loss"] for line in training], [line["eval_loss"] for line in validations], rate, stage),
        *_weights(validations, stage, rate),
        *_experts(validations, stage),
    ]


def _gradients(training: Sequence[Line], stage: str) -> Iterator[str]:
    steps = [int(line["step"]) for line in training if line.get("grad_norm") == 0]
    if steps:
        yield (
            f"the gradient was zero at {len(steps)} of {len(training)} logged steps, first at step {steps[0]}. Those"
            " steps trained nothing. Check that the examples have supervised tokens (stage=doctor shows one), and that"
            f" {stage}.method and {stage}.lora train weights that the loss depends on."
        )


def _losses(training: Sequence[float], validation: Sequence[float], rate: str, stage: str) -> Iterator[str]:
    if len(validation) > 1 and _are_equal(validation):
        yield (
            f"the validation loss stayed at {validation[0]:.6g}: training had no effect. {rate} may be too low for"
            f" {stage}.precision, or the trained weights do not affect the loss."
        )
    elif len(training) > 1 and _are_equal(training):
        yield (
            f"the training loss was {training[0]:.6g} at every logged step. Check that the examples differ and have"
            " supervised tokens (stage=doctor shows one)."
        )
    rises, slower = _rises(training), f"Lower {rate}, or raise {stage}.warmup_ratio."
    if len(validation) > 1 and is_risen(validation[0], validation[-1]):
        grew = f"the validation loss rose from {validation[0]:.4f} to {validation[-1]:.4f}"
        fell = len(training) > 1 and training[-1] < training[0] and not rises
        if fell:
            yield f"{grew} while the training loss fell: it memorizes. Train fewer {stage}.epochs or on more rows."
        else:
            yield f"{grew}. {slower}"
    elif rises:
        yield f"the training loss rose over the run, to {training[-1]:.4f}. {slower}"


def is_risen(before: float, after: float) -> bool:
    """Return whether a validation loss is so far above its value before training that training did harm."""
    return after > before * (1 + MOST_RISE)


def _are_equal(losses: Sequence[float]) -> bool:
    return max(losses) - min(losses) <= _SAME * abs(losses[0])


def _rises(losses: Sequence[float]) -> bool:
    """Return whether the last third of the losses is above the first third by more than chance (Welch's t)."""
    if len(losses) < _LEAST_LINES:
        return False
    third = len(losses) // 3
    first, last = losses[:third], losses[-third:]
    rise = statistics.fmean(last) - statistics.fmean(first)
    error = ((statistics.variance(first) + statistics.variance(last)) / third) ** 0.5
    return rise > max(MOST_RISE * statistics.fmean(first), _ERRORS * error)


def _weights(validations: Sequence[Line], stage: str, rate: str) -> Iterator[str]:
    last = validations[-1] if validations else {}
    if len(validations) < 2:
        return
    higher = f"With {rate}, updates are smaller than a step of their type or of the format. Raise it."
    if last.get("eval_moved_weights") == 0:
        yield f"training changed none of the sampled expert weights. {higher}"
    elif stage == Stage.qat.name and last.get("eval_changed_codes") == 0:
        yield f"training changed none of the sampled 4-bit values, so the export would be the one before QAT. {higher}"
    elif last.get("eval_changed_bf16_values") == 0:
        yield f"training changed none of the sampled BF16 values, so the export would be the one before it. {higher}"


def _experts(validations: Sequence[Line], stage: str) -> Iterator[str]:
    found = [line for line in validations if line.get(ROUTED, 0) >= _LEAST_TOKENS]
    if not found or not found[-1][UNUSED]:
        return
    before, after = int(found[0][UNUSED]), int(found[-1][UNUSED])
    reached = (
        f"no token of the validation examples reached {after} experts, of all layers together (before training:"
        f" {before}). An expert without tokens is not trained."
    )
    if after > before:
        yield f"{reached} The router is collapsing: raise {stage}.router_aux_loss_coef, or lower the learning rate."
    else:
        yield f"{reached} Use more varied examples if these experts should learn."
