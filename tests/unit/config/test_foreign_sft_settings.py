"""quantize.source names a stage, or a directory of adapters, which then count as an SFT with LoRA in BF16."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import Experts, FormatName, Method, PipelineConfig, Precision, QuantizeConfig, SftConfig, Stage
from pipeline.config.controls import controls_of, reason_for_none, reason_without_parts
from pipeline.config.pipeline import can_train_parts
from pipeline.config.quantize import first_training, leaves_nothing_to_round, trained_sft
from pipeline.config.rules import problems
from pipeline.doctor.plan import Plan
from pipeline.runs.run import Run

FOREIGN = PipelineConfig(stage=Stage.all, quantize=QuantizeConfig(source="my/adapters"))


def test_a_directory_is_told_from_the_stages() -> None:
    assert [QuantizeConfig(source=each).adapters for each in ("sft", "upcast", "./sft")] == [None, None, "./sft"]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("stf", "quantize.source=stf: neither a stage (sft, upcast) nor a directory of adapters. Did you mean 'sft'?"),
        ("upcats", "quantize.source=upcats: neither a stage (sft, upcast) nor a directory of adapters. Did you mean"),
        (" ", "quantize.source: is empty, as if a shell variable were not set."),
    ],
)
def test_a_mistyped_stage_is_named(source: str, told: str) -> None:
    (problem,) = problems(replace(FOREIGN, quantize=QuantizeConfig(source=source)))
    assert problem.startswith(told)


def test_a_directory_with_the_name_of_a_mistyped_stage_is_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stf").mkdir()
    monkeypatch.chdir(tmp_path)
    assert problems(replace(FOREIGN, quantize=QuantizeConfig(source="stf"))) == []


def test_a_directory_that_is_gone_breaks_no_rule() -> None:
    assert problems(FOREIGN) == []  # export and serve do not need it


def test_adapters_count_as_an_sft_with_lora_in_bf16() -> None:
    full = SftConfig(method=Method.full, precision=Precision.fp32)
    assert trained_sft("sft", full) is full
    name, first = first_training("my/adapters", full, FOREIGN.qat)
    assert (name, first.method, first.precision) == ("sft", Method.lora, Precision.bf16)
    assert can_train_parts("qat", "my/adapters", Experts.bf16)
    parts = SftConfig(method=Method.bf16_parts)
    assert not leaves_nothing_to_round("my/adapters", parts, FormatName["mxfp4"])


def test_the_plan_has_no_sft_and_starts_from_packed_experts() -> None:
    plan = Plan.of(FOREIGN)
    assert {*plan.trainings} == {"qat"}
    assert plan.starts_packed(is_mxfp4=True)
    assert {*Plan.of(replace(FOREIGN, quantize=QuantizeConfig())).trainings} == {"sft", "qat"}


def test_sft_is_refused_and_the_controls_only_round() -> None:
    (problem,) = problems(replace(FOREIGN, stage=Stage.sft))
    assert problem == "quantize.source=my/adapters: these adapters are the run's SFT. To run stage=sft, set it to sft."
    assert reason_for_none(FOREIGN) is None
    assert reason_without_parts(FOREIGN, has_mxfp4=True) is not None
    assert {each.name for each in controls_of(FOREIGN, "runs/x/sft", has_mxfp4=True)} == {"stochastic", "gptq"}


def test_a_run_with_adapters_does_not_use_the_sft_of_its_base_run(tmp_path: Path) -> None:
    for stage in ("upcast", "sft", "quantize"):
        (tmp_path / "base" / stage).mkdir(parents=True)
        (tmp_path / "base" / stage / "artifact.json").write_text("{}")
    config = replace(FOREIGN, stage=Stage.qat, run_dir=str(tmp_path / "run"), base_run=str(tmp_path / "base"))
    run = Run(config)
    assert run.stage_dir(Stage.sft) == tmp_path / "run" / "sft"
    assert run.earlier_stages() == [Stage.upcast, Stage.quantize]
