"""The controls of a run follow from its configuration: those that exist anyway or cannot be made are left out."""

from dataclasses import asdict, fields

import pytest

from config.composing import RECIPES, resolved
from pipeline.config import Experts, Method, PipelineConfig, Precision, RoundingMethod, Stage, TrainConfig
from pipeline.config.controls import (
    Control,
    controls_of,
    is_control,
    reason_for_none,
    reason_without_parts,
)
from pipeline.config.pipeline import BF16_PARTS, MORE_SFT

OTHERS = {method.name for method in RoundingMethod} - {"auto", "nearest"}


def controls(*settings: str, recipe: str = "smoke") -> dict[str, Control]:
    config = resolved(f"recipe={recipe}", "stage=all", *settings)
    return {control.name: control for control in controls_of(config, "runs/main/sft", has_mxfp4=True)}


def test_a_run_with_nearest_rounding_gets_the_other_roundings_more_sft_and_bf16_parts() -> None:
    found = controls()
    assert found.keys() == {*OTHERS, MORE_SFT, BF16_PARTS}
    assert list(found)[-2:] == [MORE_SFT, BF16_PARTS]  # those that train come last
    for name in OTHERS:
        assert found[name].stages == (Stage.quantize,) and found[name].config.quantize.method.name == name


def test_the_roundings_that_are_not_the_runs_own_become_controls() -> None:
    assert "nearest" in controls("quantize.method=stochastic")
    assert "stochastic" not in controls("quantize.method=stochastic")
    assert "auto" not in controls()


def test_more_sft_trains_as_qat_does_but_without_quantizers() -> None:
    main = resolved("recipe=smoke", "stage=all", "qat.distillation.weight=0.5", "qat.seed=7")
    (more,) = (control for control in controls_of(main, "runs/main/sft", has_mxfp4=True) if control.name == MORE_SFT)
    trained = {each.name: getattr(more.config.sft, each.name) for each in fields(TrainConfig)}
    assert trained == {each.name: getattr(main.qat, each.name) for each in fields(TrainConfig)}
    assert more.config.sft.start == "runs/main/sft" and more.stages == (Stage.sft, Stage.quantize)
    assert asdict(more.config.qat) == asdict(main.qat)  # so quantize makes the form that QAT would train


def test_more_sft_and_nearest_rounding_are_possible_if_qat_trains_other_adapters_than_sft() -> None:
    rounds = ("quantize.method=stochastic", "train@sft=lora", "train@qat=lora", "sft.lora.rank=4", "qat.lora.rank=8")
    found = controls(*rounds)
    assert found[MORE_SFT].config.sft.lora.rank == 4 and found[MORE_SFT].config.qat.lora.rank == 8
    assert "nearest" in found


def test_more_sft_is_rounded_by_the_best_method_there_is() -> None:
    best = next(name for name in ("auto", "gptq", "stochastic") if name in RoundingMethod.__members__)
    assert controls()[MORE_SFT].config.quantize.method.name == best


def test_qat_of_the_bf16_parts_is_held_against_more_steps_of_sft_by_its_own_method() -> None:
    sft = controls("train@qat=bf16_parts", "qat.max_steps=7")[MORE_SFT].config.sft
    assert (sft.method, sft.max_steps, sft.learning_rate) == (Method.full, 7, 1e-4)
    parts = ("train@qat=bf16_parts", "qat.learning_rate=2e-6")
    lora = controls(*parts, recipe="multilingual")[MORE_SFT].config.sft
    assert (lora.method, lora.precision, lora.learning_rate) == (Method.lora, Precision.bf16, pytest.approx(2e-5))


def test_bf16_parts_have_the_steps_and_the_rate_of_full_sft() -> None:
    main, parts = resolved("recipe=smoke", "stage=all"), controls()[BF16_PARTS]
    assert parts.stages == (Stage.upcast, Stage.sft)
    assert {**asdict(parts.config.sft), "method": Method.full} == asdict(main.sft)


def test_bf16_parts_after_lora_have_a_tenth_of_its_rate_and_weights_in_fp32() -> None:
    parts = controls(recipe="multilingual")[BF16_PARTS].config.sft
    assert (parts.learning_rate, parts.precision) == (pytest.approx(2e-5), Precision.mixed_bf16)
    assert controls("sft.precision=fp32", recipe="multilingual")[BF16_PARTS].config.sft.precision is Precision.fp32


def test_bf16_parts_are_rounded_if_the_format_is_not_that_of_the_base() -> None:
    assert controls("format=nvfp4", "export.target=nvfp4")[BF16_PARTS].stages[-1] is Stage.quantize


def test_bf16_parts_decide_the_form_of_their_experts_themselves() -> None:
    assert controls("upcast.experts=bf16")[BF16_PARTS].config.upcast.experts is None
    assert resolved("recipe=smoke", "stage=all", "upcast.experts=bf16").upcast.experts is Experts.bf16


def test_a_rounding_that_the_format_refuses_is_left_out() -> None:
    nvfp4 = ("format=nvfp4", "export.target=nvfp4")
    ceil = controls(*nvfp4, "format.scale_rule=ceil")
    assert "stochastic" not in ceil and ceil[MORE_SFT].config.quantize.method is RoundingMethod.nearest
    assert "stochastic" in controls(*nvfp4, "format.scale_rule=mse")


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("quantize.source=upcast", "quantize.source=upcast: without SFT, there is nothing to compare QAT with"),
        ("train@sft=bf16_parts", "sft.method=bf16_parts leaves nothing to round, so there is no QAT"),
    ],
)
def test_a_run_without_sft_or_without_rounding_has_no_controls(setting: str, reason: str) -> None:
    assert controls(setting) == {}
    assert reason_for_none(resolved("recipe=smoke", "stage=all", setting)) == reason


def test_sft_of_the_bf16_parts_for_another_format_is_not_made_twice() -> None:
    assert BF16_PARTS not in controls("train@sft=bf16_parts", "format=nvfp4", "export.target=nvfp4")


def test_bf16_parts_are_left_out_of_a_continued_run_and_of_one_with_a_bf16_source() -> None:
    continued = resolved("recipe=smoke", "stage=all", "sft.start=runs/other/sft")
    assert [each.name for each in controls_of(continued, "sft", has_mxfp4=True)][-1] == MORE_SFT
    assert (reason_without_parts(continued, has_mxfp4=True) or "").startswith("sft.start is set")
    main = resolved("recipe=smoke", "stage=all")
    assert [each.name for each in controls_of(main, "sft", has_mxfp4=False)][-1] == MORE_SFT


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_controls_of_each_recipe_obey_the_rules_and_are_runs_of_their_own(recipe: str) -> None:
    from pipeline.config import rules

    data = ["data.path=rows.jsonl"] if recipe == "own_data" else []
    for control in controls(*data, "base_run=runs/other", recipe=recipe).values():
        assert rules.problems(control.config) == [] and is_control(control.model)
        assert control.config.run_dir == f"runs/{recipe}/controls/{control.name}"
        assert control.config.base_run is None and not control.config.controls


def test_no_run_makes_controls_unless_it_is_asked() -> None:
    assert not PipelineConfig().controls and not resolved("recipe=smoke", "stage=all").controls
    assert resolved("recipe=smoke", "stage=all", "controls=true").controls
