"""The setting `overwrite`: true, false, or names of stages."""

import pytest
from conftest import run_program

from config.composing import Mistake
from pipeline.config import PipelineConfig, Stage, list_controls, rebuilds
from pipeline.config.controls import rebuilds_stage


def test_one_stage_takes_true_or_its_own_name(seen: list[PipelineConfig]) -> None:
    for value in ("true", "sft"):
        assert run_program("stage=sft", "recipe=smoke", f"overwrite={value}") == 0
    assert [rebuilds(config.overwrite, config.stage) for config in seen] == [True, True]


def test_a_list_reaches_the_stage_with_and_without_the_sweep_flag(seen: list[PipelineConfig]) -> None:
    for more in ((), ("-m",)):
        assert run_program("stage=all", "recipe=smoke", "overwrite=sft,qat", *more) == 0
    assert [config.overwrite for config in seen] == ["sft,qat"] * 2
    assert rebuilds(seen[0].overwrite, Stage.qat) and not rebuilds(seen[0].overwrite, Stage.quantize)


@pytest.mark.parametrize("value", ["more_sft/quantize,stochastic", "controls/more_sft/quantize,controls/stochastic"])
@pytest.mark.parametrize("stage", ["all", "controls"])
def test_a_list_may_have_controls_and_stages_of_controls(stage: str, value: str, seen: list[PipelineConfig]) -> None:
    assert run_program(f"stage={stage}", "recipe=smoke", f"overwrite={value}") == 0
    assert list_controls(seen[-1].overwrite) == ("more_sft/quantize", "stochastic")
    assert not rebuilds(seen[-1].overwrite, Stage.controls) and not rebuilds(seen[-1].overwrite, Stage.quantize)


def test_a_control_is_rebuilt_by_its_name_and_from_a_stage_on() -> None:
    stages = (Stage.upcast, Stage.sft, Stage.quantize)
    for overwrite, from_stage in {"more_sft": 0, "controls": 0, "more_sft/sft": 1, "more_sft/quantize": 2}.items():
        found = [rebuilds_stage(f"export,{overwrite}", "more_sft", stage) for stage in stages]
        assert found == [i >= from_stage for i in range(3)]
    assert rebuilds_stage(True, "more_sft", Stage.sft)
    for overwrite in (False, "sft,quantize", "bf16_parts", "bf16_parts/sft"):
        assert not any(rebuilds_stage(overwrite, "more_sft", stage) for stage in stages)


@pytest.mark.parametrize(
    "value", ["sftt", "sft,,qat", "sft,serve", "maybe", "all", "less_sft", "more_sft/", "more_sft/qat"]
)
def test_an_unknown_stage_is_one_message_with_all_stages(value: str, mistake: Mistake) -> None:
    message = mistake("stage=all", "recipe=smoke", f"overwrite={value}")
    assert message.startswith(
        f"overwrite={value!r}: must be true, false, or stages and controls with commas between them: doctor, "
    )


def test_a_stage_that_is_not_built_is_refused(mistake: Mistake) -> None:
    assert mistake("stage=qat", "recipe=smoke", "overwrite=sft") == (
        "overwrite=sft: stage=qat does not build sft. Use overwrite=true to rebuild qat, or stage=all to run several"
        " stages."
    )


@pytest.mark.parametrize(("stage", "value"), [("sft", "more_sft"), ("controls", "more_sft,sft")])
def test_a_control_is_refused_if_the_stage_is_not_controls(stage: str, value: str, mistake: Mistake) -> None:
    message = mistake(f"stage={stage}", "recipe=smoke", f"overwrite={value}")
    assert message.startswith(f"overwrite={value}: stage={stage} does not build ")
