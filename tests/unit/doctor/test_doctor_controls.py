"""doctor counts what the controls need on disk and on each GPU, until they are made."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluated
import pytest
from test_doctor import HEALTHY, MODEL, NEEDS, ROOMY, plan

from pipeline.checkpoints.gpt_oss import Shape
from pipeline.config import (
    ModelConfig,
    PipelineConfig,
    QuantizeConfig,
    RoundingMethod,
    Sharding,
    Stage,
    TrainConfig,
)
from pipeline.doctor import controls, display, findings, fit, needs
from pipeline.doctor.facts import Facts
from pipeline.runs.host_memory import training_bytes
from pipeline.runs.json_files import write_json
from pipeline.runs.records import DoctorRecord
from pipeline.runs.run import Run

CONTROLS = {
    "gptq": {"disk_bytes": 30, "checkpoint_bytes": 0, "device_bytes": 0},
    "bf16_parts": {"disk_bytes": 10, "checkpoint_bytes": 500, "device_bytes": 700},
}


def facts(run_dir: Path, **machine: int) -> Facts:
    run = Run(PipelineConfig(Stage.doctor, run_dir=str(run_dir), model=ModelConfig("model")))
    needed: dict[str, Any] = {**NEEDS, "controls": CONTROLS}
    report = DoctorRecord(data=HEALTHY, needs=needed, machine={}, findings=[])
    return Facts.of(report, {**ROOMY, **machine}, plan(TrainConfig(), Sharding.none), MODEL, run)


def test_controls_that_are_not_made_add_their_disk_space_and_their_checkpoints(tmp_path: Path) -> None:
    assert fit.disk_needed(facts(tmp_path)) == 105 + 30 + 10 + 500
    evaluated.record(tmp_path / "controls" / "bf16_parts" / "sft")
    write_json(tmp_path / "controls" / "bf16_parts" / "control.json", {"stage": "sft"})
    assert fit.disk_needed(facts(tmp_path)) == 105 + 30 + 180


def test_a_control_counts_its_checkpoints_or_the_layers_that_gptq_keeps_whichever_are_larger() -> None:
    nearest = plan(TrainConfig(), Sharding.none)
    gptq = replace(nearest, quantize=QuantizeConfig(method=RoundingMethod.gptq))
    layers, checkpoints = needs.kept_layers(gptq, MODEL, 8), needs.checkpoints(Shape.of(MODEL, "model"), gptq.sft)
    assert needs.kept_layers(nearest, MODEL, 8) == 0 < layers
    alone = controls.figures(gptq, (Stage.quantize,), MODEL, 8, 1)
    assert alone["checkpoint_bytes"] == layers and alone["device_bytes"] == 0
    more = controls.figures(gptq, (Stage.sft, Stage.quantize), MODEL, 8, 1)
    assert more["checkpoint_bytes"] == max(layers, checkpoints)
    assert controls.figures(gptq, (Stage.sft,), MODEL, 8, 1)["checkpoint_bytes"] == checkpoints


def test_a_control_that_does_not_fit_on_a_gpu_is_named(tmp_path: Path) -> None:
    assert findings.findings(facts(tmp_path, gpu_free_bytes=700)) == []
    (message,) = findings.findings(facts(tmp_path, gpu_free_bytes=699))
    assert message.startswith("the run does not fit. the control bf16_parts needs about 0.000700 MB on each GPU")


def test_without_gpus_controls_train_in_host_memory(tmp_path: Path) -> None:
    assert fit.host_needed(facts(tmp_path, gpus=0)) == training_bytes(700)
    (message,) = findings.findings(facts(tmp_path, gpus=0, host_free_bytes=training_bytes(700) - 1))
    assert "training the control bf16_parts without a GPU needs" in message


def test_the_report_has_the_disk_space_of_controls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    display.report(facts(tmp_path), [], [])
    assert "controls gptq, bf16_parts: 0.0 MB more on disk" in " ".join(capsys.readouterr().out.split())
