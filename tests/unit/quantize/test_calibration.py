"""GPTQ gets as many training examples as have the tokens that it needs, or as many as the user wants."""

import pytest
from datasets import Dataset

from pipeline.checkpoints.gpt_oss import Shape
from pipeline.config import QuantizeConfig
from pipeline.errors import UserError
from pipeline.quantize import calibration

SHAPE = Shape(2, 64, 96, 8, 4, 2, 32, 768)
NEEDED = 2 * 8 * 96 * 8 // 4  # twice 8 tokens per input for each of 8 experts; a token goes to 4 of them


def examples(count: int, tokens: int) -> Dataset:
    return Dataset.from_dict({"input_ids": [[0] * tokens] * count, "labels": [[0] * tokens] * count})


@pytest.mark.parametrize(("count", "expected"), [(1000, NEEDED // 100 + 1), (20, 20)])
def test_by_default_the_tokens_are_twice_those_that_the_experts_need(count: int, expected: int) -> None:
    assert NEEDED % 100
    chosen = calibration.for_gptq(examples(count, 100), QuantizeConfig(), SHAPE, 4)
    assert len(chosen) == expected


def test_the_number_of_examples_can_be_set(capsys: pytest.CaptureFixture[str]) -> None:
    settings = QuantizeConfig(calibration_samples=3)
    assert len(calibration.for_gptq(examples(10, 100), settings, SHAPE, 4)) == 3
    assert "3 training examples with 300 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"quantize\.calibration_samples=3: .*gptq.* which has 2 training examples"):
        calibration.for_gptq(examples(2, 100), settings, SHAPE, 4)


@pytest.mark.parametrize(("asked", "available", "expected"), [(None, 100, 64), (None, 10, 10), (5, 100, 5)])
def test_a_format_without_calibration_takes_what_there_is(asked: int | None, available: int, expected: int) -> None:
    settings = QuantizeConfig(calibration_samples=asked)
    chosen = calibration.for_format(examples(available, 1), settings, "mxfp4", is_calibrated=False)
    assert len(chosen) == expected


def test_a_calibrated_format_needs_enough_examples() -> None:
    with pytest.raises(UserError, match=r"quantize\.calibration_samples=64: format=nvfp4_w4a4 is calibrated"):
        calibration.for_format(examples(63, 1), QuantizeConfig(), "nvfp4_w4a4", is_calibrated=True)
