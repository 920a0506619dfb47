"""doctor names settings with which everything fits, and the prediction with these settings agrees."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_device_memory import MODEL
from test_doctor import HEALTHY

from pipeline.config import Experts, Method, ModelConfig, PipelineConfig, Precision, Sharding, Stage, rules
from pipeline.config.doctor import DoctorConfig
from pipeline.doctor import fit, prediction
from pipeline.doctor.facts import Facts
from pipeline.doctor.plan import Plan
from pipeline.errors import UserError
from pipeline.runs.run import Run

LONGEST = 1024
MXFP4 = {**MODEL, "quantization_config": {"quant_method": "mxfp4"}}


def config_of(run_dir: Path, **training: Any) -> PipelineConfig:
    base = PipelineConfig(Stage.doctor, run_dir=str(run_dir), model=ModelConfig("model"))
    settings = {"precision": Precision.fp32, **training}
    return replace(base, sft=replace(base.sft, **settings), qat=replace(base.qat, **settings))


def facts_of(config: PipelineConfig, model: dict[str, Any] = MODEL, **machine: int) -> Facts:
    free = {"disk_free_bytes": 10**12, "host_free_bytes": 10**12, "gpus": 1, "gpu_free_bytes": 10**12}
    free |= {"processes": 1, "local_processes": 1, **machine}
    data: dict[str, Any] = {**HEALTHY, "lengths": {**HEALTHY["lengths"], "longest": LONGEST}}
    needed = prediction.needs_of(config, model, LONGEST, free["processes"])
    return Facts(data, needed, free, Plan.of(config), model, Run(config))  # type: ignore[arg-type]


def proposed(finding: str) -> list[str]:
    return finding.partition("add to the command: ")[2].partition(". Predicted")[0].split()


def sizes(config: PipelineConfig, model: dict[str, Any] = MODEL) -> list[int]:
    return [each["bytes"] for each in facts_of(config, model).needs["devices"].values()]


def only(findings: Sequence[str]) -> str:
    (finding,) = findings
    return finding


def test_settings_of_both_stages_are_named_if_both_do_not_fit(tmp_path: Path) -> None:
    big, small = config_of(tmp_path, batch_size=8), config_of(tmp_path, batch_size=1, gradient_accumulation_steps=64)
    found = proposed(only(fit.findings(facts_of(big, gpu_free_bytes=max(sizes(small))))))
    assert found == [
        *("sft.batch_size=1", "sft.gradient_accumulation_steps=64"),
        *("qat.batch_size=1", "qat.gradient_accumulation_steps=64"),
    ]


def test_settings_that_one_stage_does_not_need_are_left_out(tmp_path: Path) -> None:
    big = config_of(tmp_path, batch_size=8)
    mixed = replace(big, sft=replace(big.sft, batch_size=1, gradient_accumulation_steps=64))
    free = max(sizes(config_of(tmp_path, batch_size=1, gradient_accumulation_steps=64)))
    assert all(word.startswith("qat.") for word in proposed(only(fit.findings(facts_of(mixed, gpu_free_bytes=free)))))


def test_several_settings_are_combined_if_no_single_one_is_enough(tmp_path: Path) -> None:
    wasteful = config_of(tmp_path, batch_size=8, gradient_checkpointing=False)
    both = config_of(tmp_path, batch_size=1, gradient_accumulation_steps=64, gradient_checkpointing=True)
    free = max(sizes(both))
    assert min(sizes(config_of(tmp_path, batch_size=8))) > free
    assert min(sizes(config_of(tmp_path, batch_size=1, gradient_checkpointing=False))) > free
    found = proposed(only(fit.findings(facts_of(wasteful, gpu_free_bytes=free))))
    assert {"sft.batch_size=1", "sft.gradient_checkpointing=true", "qat.batch_size=1"} <= set(found)


def test_the_proposed_settings_break_no_rule_and_fit(tmp_path: Path) -> None:
    lora = config_of(tmp_path, method=Method.lora, precision=Precision.bf16)
    found = proposed(only(fit.findings(facts_of(config_of(tmp_path), MXFP4, gpu_free_bytes=max(sizes(lora, MXFP4))))))
    assert found == ["train@sft=lora", "train@qat=lora"] and rules.problems(lora) == []


def test_packed_experts_come_first_because_they_do_not_change_the_result(tmp_path: Path) -> None:
    lora = config_of(tmp_path, method=Method.lora, precision=Precision.bf16, batch_size=2)
    decoded = replace(lora, upcast=replace(lora.upcast, experts=Experts.bf16))
    free = max(sizes(lora, MXFP4))
    assert max(sizes(decoded, MXFP4)) > free
    assert proposed(only(fit.findings(facts_of(decoded, MXFP4, gpu_free_bytes=free)))) == ["upcast.experts=packed"]


def test_processes_that_are_there_share_the_model_before_training_changes(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    sharded = replace(config, sharding=Sharding.fsdp2)
    free = max(each["bytes"] for each in facts_of(sharded, processes=4).needs["devices"].values())
    finding = only(fit.findings(facts_of(config, gpu_free_bytes=free, processes=4, local_processes=4, gpus=4)))
    assert proposed(finding) == ["sharding=fsdp2"]


def test_if_no_settings_help_the_hardware_is_named(tmp_path: Path) -> None:
    finding = only(fit.findings(facts_of(config_of(tmp_path), gpu_free_bytes=99)))
    assert "No settings known here make everything fit on this machine. It needs a GPU with" in finding


def test_a_disk_that_is_too_small_never_lowers_the_quality(tmp_path: Path) -> None:
    config = config_of(tmp_path, save_total_limit=5)
    finding = only(fit.findings(facts_of(config, disk_free_bytes=99)))
    words = proposed(finding)
    assert words[:2] == ["sft.save_total_limit=2", "qat.save_total_limit=2"] and words[2].startswith("run_dir=<a")
    assert "lora" not in finding


def test_a_run_that_does_not_fit_is_stopped_unless_it_is_not_required(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path)
    with pytest.raises(
        UserError, match=r"the run does not fit.* stage=doctor: it measures.* set doctor\.required=false"
    ):
        fit.raise_if_too_small(facts_of(config, gpu_free_bytes=99))
    fit.raise_if_too_small(facts_of(replace(config, doctor=DoctorConfig(required=False)), gpu_free_bytes=99))
    assert "It starts anyway" in capsys.readouterr().err
    fit.raise_if_too_small(facts_of(config))


@pytest.mark.parametrize(
    ("needed", "free", "shown"),
    [
        (1_240_000_000, 1_235_000_000, ("1.240 GB", "1.235 GB")),
        (42_300_000_000, 24_000_000_000, ("42.3 GB", "24.0 GB")),
        (1_000_000_001, 1_000_000_000, ("1.000000001 GB", "1.000000000 GB")),
        (1_000_000_000, 999_999_999, ("1.0 GB", "1000.0 MB")),
        (50_001, 50_000, ("0.050001 MB", "0.050000 MB")),
    ],
)
def test_the_figures_of_a_shortage_look_different(needed: int, free: int, shown: tuple[str, str]) -> None:
    text = fit.Shortage("sft", fit.HOST, needed, free).describe()
    assert text == f"sft needs {shown[0]} of host memory, but only {shown[1]} are free."
