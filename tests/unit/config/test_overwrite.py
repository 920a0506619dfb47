"""The setting `overwrite`: true, false, or names of stages."""

import pytest
from conftest import run_program

from config.composing import Mistake
from pipeline.config import PipelineConfig, Stage, rebuilds


def test_one_stage_takes_true_or_its_own_name(seen: list[PipelineConfig]) -> None:
    for value in ("true", "sft"):
        assert run_program("stage=sft", "recipe=smoke", f"overwrite={value}") == 0
    assert [rebuilds(config.overwrite, config.stage) for config in seen] == [True, True]


def test_a_list_reaches_the_stage_with_and_without_the_sweep_flag(seen: list[PipelineConfig]) -> None:
    for more in ((), ("-m",)):
        assert run_program("stage=all", "recipe=smoke", "overwrite=sft,qat", *more) == 0
    assert [config.overwrite for config in seen] == ["sft,qat"] * 2
    assert rebuilds(seen[0].overwrite, Stage.qat) and not rebuilds(seen[0].overwrite, Stage.quantize)


@pytest.mark.parametrize("value", ["sftt", "sft,,qat", "sft,serve", "maybe", "all"])
def test_an_unknown_stage_is_one_message_with_all_stages(value: str, mistake: Mistake) -> None:
    message = mistake("stage=all", "recipe=smoke", f"overwrite={value}")
    assert message.startswith(f"overwrite={value!r}: must be true, false, or stages with commas between them: doctor, ")


def test_a_stage_that_is_not_built_is_refused(mistake: Mistake) -> None:
    assert mistake("stage=qat", "recipe=smoke", "overwrite=sft") == (
        "overwrite=sft: stage=qat does not build sft. Use overwrite=true to rebuild qat, or stage=all to run several"
        " stages."
    )
