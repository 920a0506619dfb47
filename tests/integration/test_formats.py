"""NVFP4 for weights, and for weights and inputs: training, evaluation, and combinations that are refused early."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SHORT, linked, run_program

from pipeline.models import fake_quantizers, loading, references
from pipeline.numerics.formats import FORMATS
from pipeline.runs import artifacts

QUICK = ("recipe=smoke", *SHORT, "qat.max_steps=3")
QUANTIZERS = {"nvfp4": 4, "nvfp4_w4a4": 8}  # 2 layers x 2 stacks. W4A4 adds a quantizer for the inputs of each stack
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture(scope="module")
def trained(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the run directory of a format. Tests must not write to it.

    The first call for a format runs the stages from quantize to compare.
    """
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            # upcast and sft do not depend on the format.
            run = linked(tmp_path_factory.mktemp(name) / "run", smoke_run, "source", "upcast", "sft")
            for stage in ("quantize", "qat", "evaluate", "compare"):
                arguments = (f"stage={stage}", f"run_dir={run}", *QUICK, f"format={name}")
                assert run_program(*arguments, "evaluate.source=all") == 0, stage
            made[name] = run
        return made[name]

    return make


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_restored_model_computes_what_the_calibrated_one_did(name: str, smoke_run: Path, tmp_path: Path) -> None:
    """The restored state includes the ranges of inputs, which only calibration determines."""
    block_format = FORMATS[name].with_rule("mse")
    ref = references.of_artifact(artifacts.load(smoke_run / "sft"))
    calibrated, restored = (loading.load_quantized(ref, torch.float32) for _ in range(2))
    ids = torch.arange(40).view(2, 20)
    fake_quantizers.insert(calibrated, block_format, lambda model: model(input_ids=ids))
    fake_quantizers.save_state(calibrated, tmp_path)
    fake_quantizers.restore(restored, tmp_path, block_format)
    with torch.no_grad():
        expected, found = (model.eval()(input_ids=ids).logits for model in (calibrated, restored))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_artifacts_record_the_format_of_training(name: str, trained: Callable[[str], Path]) -> None:
    for stage in ("quantize", "qat"):
        artifact = artifacts.load(trained(name) / stage)
        assert (artifact.fake_quantized, artifact.scale_rule) == (name, "mse")
        assert artifact.details["quantizers"] == QUANTIZERS[name]
        assert artifact.kind is artifacts.Kind.checkpoint


@pytest.mark.parametrize("name", QUANTIZERS)
def test_evaluate_measures_the_model_that_was_trained(name: str, trained: Callable[[str], Path]) -> None:
    """`evaluate` runs the model with its quantizers. So it finds the same validation loss as training."""
    results = artifacts.load(trained(name) / "evaluate").details["results"]
    qat = artifacts.load(trained(name) / "qat").details
    assert results["qat"]["validation_loss"] == pytest.approx(qat["validation_loss"], rel=1e-5)
    assert results["quantize"]["validation_loss"] == pytest.approx(qat["validation_loss_before"], rel=1e-5)
    assert results["quantize"]["validation_loss"] != results["sft"]["validation_loss"]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_qat_improves_on_the_quantized_model(name: str, trained: Callable[[str], Path]) -> None:
    results = artifacts.load(trained(name) / "evaluate").details["results"]
    assert results["qat"]["validation_loss"] < results["quantize"]["validation_loss"]


def test_quantized_inputs_change_the_loss_of_the_same_weights(trained: Callable[[str], Path]) -> None:
    weights, inputs = (artifacts.load(trained(name) / "evaluate").details["results"]["quantize"] for name in QUANTIZERS)
    assert weights["relative_weight_error"] == inputs["relative_weight_error"]
    assert weights["validation_loss"] != inputs["validation_loss"]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_comparison_has_a_row_for_every_model(name: str, trained: Callable[[str], Path]) -> None:
    rows = json.loads((trained(name) / "compare" / "compare.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["upcast", "sft", "quantize", "qat"]


# Combinations that are refused.


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the only message of a run that must end with status 2."""
    capsys.readouterr()
    assert run_program(*arguments) == 2
    message = capsys.readouterr().err
    assert message.count("error: ") == 1, message
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("stage", ["export", "all"])
def test_a_format_that_the_target_cannot_store_is_refused_before_any_work(
    stage: str, name: str, tmp_path: Path, capsys
) -> None:
    message = error_of(capsys, f"stage={stage}", f"run_dir={tmp_path / 'run'}", *QUICK, f"format={name}")
    assert "export.target=mxfp4" in message
    assert f"format={name}" in message
    assert not (tmp_path / "run").exists()


def test_a_model_trained_for_nvfp4_is_not_exported_to_mxfp4(trained: Callable[[str], Path], capsys) -> None:
    message = error_of(capsys, "stage=export", f"run_dir={trained('nvfp4')}", *QUICK, "export.source=qat")
    assert "format=nvfp4" in message
    assert "format=mxfp4" in message
    assert not (trained("nvfp4") / "export").exists()


@pytest.mark.parametrize("stage", ["quantize", "all"])
def test_a_rule_that_the_format_does_not_have_is_refused(stage: str, tmp_path: Path, capsys) -> None:
    arguments = (f"stage={stage}", f"run_dir={tmp_path / 'run'}", *QUICK, "format=mxfp4", "format.scale_rule=nearest")
    message = error_of(capsys, *arguments)
    assert "format.scale_rule=nearest" in message
    assert all(rule in message for rule in ("ceil", "floor", "mse"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("other", ["format.scale_rule=nearest", "format=mxfp4", "format=nvfp4_w4a4"])
def test_qat_for_another_format_than_the_quantizers_is_refused_before_it_trains(
    other: str, trained: Callable[[str], Path], tmp_path: Path, capsys
) -> None:
    run = Path(shutil.copytree(trained("nvfp4"), tmp_path / "run", symlinks=True))
    shutil.rmtree(run / "qat")
    formats = ("format=nvfp4", other) if other.startswith("format.") else (other,)
    message = error_of(capsys, "stage=qat", f"run_dir={run}", *QUICK, *formats)
    assert "nvfp4" in message
    assert "quantize" in message
    assert not (run / "qat" / "metrics.jsonl").exists()


@NO_GPU
def test_a_missing_gpu_is_refused_and_the_stage_runs_on_the_cpu(tmp_path: Path, capsys) -> None:
    arguments = (f"run_dir={tmp_path}", *QUICK)
    assert "device=cuda: no GPU" in error_of(capsys, "stage=upcast", *arguments, "device=cuda")
    assert not (tmp_path / "upcast" / artifacts.ARTIFACT_FILE).exists()
    assert run_program("stage=upcast", *arguments, "device=cpu") == 0


@NO_GPU
def test_a_missing_gpu_is_refused_for_the_export(smoke_run: Path, tmp_path: Path, capsys) -> None:
    run_dir = linked(tmp_path, smoke_run, "source", "upcast", "sft")
    message = error_of(capsys, "stage=export", f"run_dir={run_dir}", *QUICK, "device=cuda")
    assert "device=cuda: no GPU" in message
    assert not (run_dir / "export").exists()
