"""Chooses the training examples that calibrate a format or GPTQ."""

from datasets import Dataset

from pipeline.checkpoints.gpt_oss import Shape
from pipeline.config import QuantizeConfig, calibration_tokens
from pipeline.config.quantize import CALIBRATION_SAMPLES
from pipeline.errors import UserError
from pipeline.runs.console import say


def for_format(train: Dataset, settings: QuantizeConfig, format_name: str, *, is_calibrated: bool) -> Dataset:
    """Return the first training examples. They calibrate the format, or only show that every quantizer runs.

    Raises:
        UserError: the format is calibrated, and the data has too few examples.
    """
    samples = settings.calibration_samples or CALIBRATION_SAMPLES
    if is_calibrated and len(train) < samples:
        raise _too_few(samples, f"format={format_name} is calibrated", train)
    return train.select(range(min(samples, len(train))))


def for_gptq(train: Dataset, settings: QuantizeConfig, shape: Shape, experts_per_token: int) -> Dataset:
    """Return the first training examples, as many as GPTQ needs.

    Without `quantize.calibration_samples`, they have twice the tokens that all experts need together
    (`quantize.tokens_per_input`). If the data has fewer tokens, all examples are used.

    Raises:
        UserError: the data has fewer examples than `quantize.calibration_samples`.
    """
    samples = settings.calibration_samples
    if samples is not None and len(train) < samples:
        raise _too_few(samples, "quantize.method=gptq is calibrated", train)
    inputs = max(shape.hidden_size, shape.intermediate_size)
    wanted = calibration_tokens(settings, inputs, shape.num_local_experts, experts_per_token)
    tokens = count = 0
    while count < len(train) if samples is None else count < samples:
        if samples is None and tokens >= wanted:
            break
        tokens += len(train[count]["input_ids"])
        count += 1
    say("quantize", f"gptq: {count} training examples with {tokens:,} tokens calibrate each layer")
    return train.select(range(count))


def _too_few(samples: int, what: str, train: Dataset) -> UserError:
    return UserError(
        f"quantize.calibration_samples={samples}: {what} on the data, which has {len(train)} training examples. Use"
        " more data, or set a lower number. The result is less reliable with fewer examples."
    )
