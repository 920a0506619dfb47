"""Run recipe=smoke through all stages, check its artifacts, and run it a second time."""

import fcntl
import json
import shutil
from pathlib import Path

import pytest
from conftest import SHORT, outcomes, run_program
from run_files import source_of

from pipeline.checkpoints.config_json import read_config
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.side_files import side_files
from pipeline.config import TinyConfig
from pipeline.models.tiny_model import create_tiny
from pipeline.runs import artifacts
from pipeline.stages import all as every_stage

STAGES = [stage.name for stage in every_stage.STAGES]


def metrics(run_dir: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_leaves_a_complete_artifact(smoke_run: Path, stage: str) -> None:
    record = json.loads((smoke_run / stage / "artifact.json").read_text())
    assert record["stage"] == stage
    assert record["fingerprint"] == artifacts.fingerprint_of(smoke_run / stage)[0]
    assert {"libraries", "host", "device", "seconds", "peak_memory_bytes", "base_model", "git_commit"} <= record.keys()
    assert (smoke_run / stage / "config.yaml").is_file()
    assert metrics(smoke_run, stage)
    assert not (smoke_run / stage / artifacts.UNFINISHED_FILE).exists()
    assert not (smoke_run / stage / artifacts.CHECKPOINTS_DIR).exists()


def test_parents_are_the_fingerprints_of_the_stages_before(smoke_run: Path) -> None:
    load = {name: artifacts.load(smoke_run / name) for name in STAGES}
    assert load["sft"].parents == {"upcast": load["upcast"].fingerprint}
    assert load["quantize"].parents == {"sft": load["sft"].fingerprint}
    assert load["qat"].parents == {"quantize": load["quantize"].fingerprint}
    assert load["export"].parents["model"] == load["qat"].fingerprint
    assert load["verify"].parents["checkpoint"] == load["export"].fingerprint


def test_sft_learns(smoke_run: Path) -> None:
    details = artifacts.load(smoke_run / "sft").details
    assert details["validation_loss"] < 0.6 * details["validation_loss_before"]
    training = [line["loss"] for line in metrics(smoke_run, "sft") if "loss" in line]
    assert training[-1] < 0.6 * training[0]


def test_qat_improves_on_the_quantized_model(smoke_run: Path) -> None:
    results = artifacts.load(smoke_run / "evaluate").details["results"]
    assert results["qat"]["validation_loss"] < results["quantize"]["validation_loss"]
    assert results["quantize"]["validation_loss"] != results["sft"]["validation_loss"]


def test_training_and_evaluate_report_the_same_validation_loss(smoke_run: Path) -> None:
    results = artifacts.load(smoke_run / "evaluate").details["results"]
    for stage in ("sft", "qat"):
        trained = artifacts.load(smoke_run / stage).details["validation_loss"]
        assert results[stage]["validation_loss"] == pytest.approx(trained, rel=1e-5)


def test_the_export_has_the_names_shapes_types_and_configuration_of_the_source(smoke_run: Path) -> None:
    source, export = Checkpoint(source_of(smoke_run)), Checkpoint(smoke_run / "export")
    assert export.tensors == source.tensors
    assert export.config == source.config
    for name in side_files(source.directory):
        assert (export.directory / name).read_bytes() == (source.directory / name).read_bytes()


def test_the_export_differs_from_the_source_where_training_reached(smoke_run: Path) -> None:
    source, export = Checkpoint(source_of(smoke_run)), Checkpoint(smoke_run / "export")
    blocks = [name for name in export.tensors if name.endswith("_blocks")]
    assert all((export.read(name) != source.read(name)).any() for name in blocks)


def test_the_upcast_keeps_the_configuration_but_for_quantization(smoke_run: Path) -> None:
    config = read_config(source_of(smoke_run))
    del config["quantization_config"]
    assert read_config(smoke_run / "upcast") == {**config, "dtype": "bfloat16"}


def test_the_comparison_has_a_row_for_every_model(smoke_run: Path) -> None:
    rows = json.loads((smoke_run / "compare" / "compare.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["upcast", "sft", "quantize", "qat", "export"]
    figures = {row["model"]: row for row in rows}
    assert figures["sft"]["relative_weight_error"] == 0
    assert 0.05 < figures["quantize"]["relative_weight_error"] < 0.2
    assert figures["export"]["relative_weight_error"] == figures["qat"]["relative_weight_error"]
    assert figures["export"]["weight_bytes"] < 0.3 * figures["sft"]["weight_bytes"]
    table = (smoke_run / "compare" / "compare.md").read_text()
    assert all(f"| {name} |" in table for name in ("Original", "SFT", "PTQ", "QAT", "Exported"))


def test_the_proof_found_no_difference(smoke_run: Path) -> None:
    report = json.loads((smoke_run / "verify" / "report.json").read_text())
    assert outcomes(smoke_run) == {"ok"}
    by_title = {check["title"].split(":")[0]: check["measured"] for check in report["checks"]}
    assert by_title["experts"]["differing_values"] == 0
    assert by_title["experts"]["values"] == 2 * 8 * (64 * 192 + 96 * 64)
    assert by_title["logits"]["largest_difference"] == 0


def test_a_second_run_does_nothing(smoke_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in smoke_run.rglob("*") if path.is_file()}
    assert run_program("stage=all", "recipe=smoke", f"run_dir={smoke_run}", *SHORT) == 0
    report = f"[compare] report with plots and answers: {smoke_run / 'compare' / 'compare.html'}"
    names = ", ".join(STAGES)
    assert capsys.readouterr().out.splitlines() == [f"[all] up to date: {names} ({smoke_run})", report]
    assert {path: path.stat().st_mtime_ns for path in smoke_run.rglob("*") if path.is_file()} == before


def test_a_changed_setting_is_named_and_nothing_is_touched(smoke_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("stage=sft", "recipe=smoke", f"run_dir={smoke_run}", *SHORT, "sft.learning_rate=0.002")
    assert run_program(*arguments) == 2
    assert "sft.learning_rate: was 0.003, is 0.002" in capsys.readouterr().err


def test_transformers_loads_every_checkpoint_whole(smoke_run: Path) -> None:
    from transformers import AutoModelForCausalLM

    for stage in ("upcast", "sft", "quantize", "qat", "export"):
        _, info = AutoModelForCausalLM.from_pretrained(smoke_run / stage, output_loading_info=True)
        assert not any(info.values()), stage


def test_stage_made_from_an_earlier_parent_is_refused(smoke_run: Path, tmp_path: Path, capsys) -> None:
    run = Path(shutil.copytree(smoke_run, tmp_path / "run", symlinks=True))
    record = json.loads((run / "sft" / "artifact.json").read_text())
    (run / "sft" / "artifact.json").write_text(json.dumps({**record, "fingerprint": "rebuilt"}))
    assert run_program("stage=export", "recipe=smoke", *SHORT, f"run_dir={run}", "overwrite=true") == 2
    assert f"{run / 'quantize'} was made from an earlier sft" in capsys.readouterr().err


def test_the_same_model_at_another_path_is_the_same_model(smoke_run: Path, capsys) -> None:
    arguments = ("stage=sft", "recipe=smoke", *SHORT, f"run_dir={smoke_run}", f"model.path={source_of(smoke_run)}")
    assert run_program(*arguments) == 0
    assert "[sft] up to date" in capsys.readouterr().out


def test_another_model_in_the_same_run_is_refused(smoke_run: Path, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other"
    create_tiny(other, TinyConfig(seed=7))
    arguments = ("stage=sft", "recipe=smoke", *SHORT, f"run_dir={smoke_run}", f"model.path={other}")
    assert run_program(*arguments) == 2
    assert "was made from synthetic://tiny" in capsys.readouterr().err


def test_fewer_steps_than_a_logging_interval_are_trained_too(smoke_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(smoke_run, tmp_path / "run", symlinks=True))
    arguments = ("stage=sft", "recipe=smoke", *SHORT, f"run_dir={run}", "overwrite=true")
    assert run_program(*arguments, "sft.max_steps=3", "sft.logging_steps=50") == 0
    assert artifacts.load(run / "sft").details["steps"] == 3


def test_second_run_at_the_same_time_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "upcast").mkdir()
    with (tmp_path / ".upcast.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_program("stage=upcast", "recipe=smoke", f"run_dir={tmp_path}") == 2
    assert "another run is working there" in capsys.readouterr().err
