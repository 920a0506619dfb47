"""Training of the BF16 parts changes all tensors but the experts' weights. Their bytes reach the export unchanged."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_lines import Line, run
from conftest import SHORT, linked, outcomes, run_program
from run_files import source_of
from test_processes import losses
from test_sharding import launch_lines

from pipeline.checkpoints.gpt_oss import EXPERT_WEIGHTS, is_packed_name, other_tensors
from pipeline.checkpoints.reading import Checkpoint
from pipeline.models import loading, packed_experts, references
from pipeline.runs import artifacts
from pipeline.runs.artifacts import Kind
from pipeline.runs.metrics import read_metrics
from pipeline.runs.run import DATA_DIR

SETTINGS = ("recipe=smoke", "train@sft=bf16_parts", *SHORT)


@pytest.fixture(scope="module")
def parts_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which `all` has run with bf16_parts. Tests must not write to it."""
    run_dir: Path = tmp_path_factory.mktemp("parts") / "run"
    assert run_program("stage=all", f"run_dir={run_dir}", *SETTINGS) == 0
    return run_dir


@pytest.mark.parametrize("stage", ["sft", "export"])
def test_only_the_experts_weights_keep_their_bytes(stage: str, parts_run: Path) -> None:
    base, trained = Checkpoint(source_of(parts_run)), Checkpoint(parts_run / stage)
    assert trained.is_packed and trained.tensors == base.tensors and trained.config == base.config
    same = {name for name in base.tensors if torch.equal(base.read(name), trained.read(name))}
    assert same == {name for name in base.tensors if is_packed_name(name)}


def test_the_export_has_the_bytes_of_the_fine_tuned_model_and_is_proved(parts_run: Path) -> None:
    sft, export = Checkpoint(parts_run / "sft"), Checkpoint(parts_run / "export")
    assert all(torch.equal(sft.read(name), export.read(name)) for name in sft.tensors)
    details = artifacts.load(parts_run / "export").details
    assert details["copied_experts"] > 0 and details["moved_weights"] == 0 and details["snr_db"] is None
    assert "FAILED" not in outcomes(parts_run)


def test_all_skips_quantize_and_qat_and_evaluates_the_others(parts_run: Path) -> None:
    assert not (parts_run / "quantize").exists() and not (parts_run / "qat").exists()
    results = artifacts.load(parts_run / "evaluate").details["results"]
    assert results.keys() == {"upcast", "sft", "export"}
    assert (
        results["export"]["validation_loss"] == results["sft"]["validation_loss"] < results["upcast"]["validation_loss"]
    )


def test_the_fine_tuned_model_is_a_checkpoint_that_transformers_loads(parts_run: Path) -> None:
    assert artifacts.load(parts_run / "sft").kind is Kind.packed
    ids = torch.arange(60).reshape(2, 30)
    plain, packed = (load(parts_run / "sft", torch.float32) for load in (loading.load_plain, loading.load_packed))
    assert packed_experts.is_packed(packed)
    with torch.no_grad():
        torch.testing.assert_close(packed(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stage", ["quantize", "qat"])
def test_quantize_and_qat_say_that_there_is_nothing_to_round(
    stage: str, parts_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = linked(tmp_path / "run", parts_run, "source", "upcast", "sft")
    assert run_program(f"stage={stage}", f"run_dir={run_dir}", *SETTINGS) == 2
    assert "sft.method=bf16_parts: there is nothing to round." in capsys.readouterr().err


def test_metrics_have_the_share_of_bf16_values_that_changed(parts_run: Path) -> None:
    shares = [line["eval_changed_bf16_values"] for line in read_metrics(parts_run / "sft") if "eval_loss" in line]
    assert shares[0] == 0 and 0.3 < shares[1] <= shares[-1] <= 1


def trained_bytes(run_dir: Path) -> str:
    return artifacts.load(run_dir / "sft").fingerprint


def test_an_interrupted_training_resumes_to_the_same_weights(
    parts_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = linked(tmp_path / "run", parts_run, "source", "upcast")
    line = Line(["stage=sft", f"run_dir={run_dir}", *SETTINGS], interrupted_at=6)
    assert run(line)["status"] == 130
    (checkpoint,) = (run_dir / "sft" / "checkpoints").glob("checkpoint-*")
    saved = {name for file in checkpoint.glob("*.safetensors") for name in torch_names(file)}
    assert saved == other_tensors(Checkpoint(run_dir / "upcast").shape).keys()
    assert run(replace(line, interrupted_at=None))["status"] == 0
    assert "resuming from step 6" in (text := capfd.readouterr().out) and "missing keys" not in text
    assert trained_bytes(run_dir) == trained_bytes(parts_run)


def torch_names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


RISING = ("sft.learning_rate=0.3", "sft.lr_scheduler=constant", "sft.warmup_ratio=0", "sft.max_steps=6")
OFTEN = ("sft.save_steps=2", "sft.eval_steps=2", "sft.max_steps=6")
PROCESSES = {
    "ddp": (*OFTEN,),
    "fsdp2": (*OFTEN, "sharding=fsdp2"),
    "mixed": (*OFTEN, "sft.precision=mixed_bf16"),
    "zero2": (*OFTEN, "sharding=zero2"),
    "mixed_fsdp2": (*OFTEN, "sft.precision=mixed_bf16", "sharding=fsdp2"),
    "mixed_zero3": (*OFTEN, "sft.precision=mixed_bf16", "sharding=zero3"),
}


def test_the_best_weights_are_kept(parts_run: Path, tmp_path: Path) -> None:
    """The learning rate is so high that the loss rises after the first checkpoint."""
    whole, short = (linked(tmp_path / name, parts_run, "source", "upcast") for name in ("whole", "short"))
    often = (*SETTINGS, *OFTEN, *RISING)
    assert run_program("stage=sft", f"run_dir={whole}", *often) == 0
    best = artifacts.load(whole / "sft").details["kept_step"]
    assert best < 6
    until_best = (f"sft.max_steps={best}", "sft.keep_best=false")
    assert run_program("stage=sft", f"run_dir={short}", *often, *until_best) == 0
    assert trained_bytes(short) == trained_bytes(whole)


@pytest.fixture(scope="module")
def by_two(parts_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by two processes, which are interrupted once. The global batch is that of one process, in `one`."""
    directory = tmp_path_factory.mktemp("by_two")
    lines = []
    for name, more in PROCESSES.items():
        run_dir = directory / name
        for part in ("source", "upcast", DATA_DIR):
            if (parts_run / part).exists():
                shutil.copytree(parts_run / part, run_dir / part)
        arguments = ["stage=sft", f"run_dir={run_dir}", *SETTINGS, *more, "sft.batch_size=4"]
        lines += [Line(arguments, interrupted_at=2), Line(arguments)]
    found = launch_lines(directory / "lines", 2, lines)
    assert [outcome["status"] for outcome in found] == [130, 0] * len(PROCESSES)
    return directory


@pytest.fixture(scope="module")
def by_one(parts_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs by one process, in FP32 and in mixed precision. They have no sharding."""
    directory = tmp_path_factory.mktemp("by_one")
    for name in ("ddp", "mixed"):
        run_dir = linked(directory / name, parts_run, "source", "upcast")
        assert run_program("stage=sft", f"run_dir={run_dir}", *SETTINGS, *PROCESSES[name]) == 0
    return {name: directory / ("mixed" if name.startswith("mixed") else "ddp") for name in PROCESSES}


@pytest.mark.parametrize("name", PROCESSES)
def test_two_processes_have_the_losses_of_one_after_an_interruption(
    name: str, by_two: Path, by_one: dict[str, Path], parts_run: Path
) -> None:
    tolerance = 1e-2 if "mixed" in name else 1e-5  # sharding casts weights to BF16 before layers are gathered
    assert losses(by_two / name, "sft") == pytest.approx(losses(by_one[name], "sft"), rel=tolerance)
    saved, base = Checkpoint(by_two / name / "sft"), Checkpoint(parts_run / "upcast")
    assert all(torch.equal(saved.read(each), base.read(each)) for each in base.tensors if is_packed_name(each))


BEFORE_QAT = {
    "after full SFT": ("recipe=smoke",),
    "after LoRA": ("recipe=smoke_lora",),
    "in mixed precision": ("recipe=smoke", "qat.precision=mixed_bf16", "qat.packing=true"),
    "with a teacher": ("recipe=smoke", "qat.distillation.weight=0.5", "qat.gradient_checkpointing=true"),
    "nvfp4": ("recipe=smoke", "format=nvfp4", "export.target=nvfp4"),
    "importance": ("recipe=smoke", "format.scale_rule=mse", "format.importance=true"),
}

SAME_STAGES = {"in mixed precision": 3, "with a teacher": 3, "nvfp4": 2, "importance": 2}
"""Settings whose runs have the first stages of "after full SFT", and the number of these stages."""


@pytest.fixture(scope="module")
def qat_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs whose QAT trains the BF16 parts, up to verify. Tests must not write to them."""
    directory = tmp_path_factory.mktemp("qat")
    for name, settings in BEFORE_QAT.items():
        stages = ["upcast", "sft", "quantize", "qat", "export", "verify"]
        if same := SAME_STAGES.get(name, 0):
            linked(directory / name, directory / "after full SFT", *stages[:same])
            del stages[:same]
        for stage in stages:
            arguments = (f"run_dir={directory / name}", *SHORT, *settings, "train@qat=bf16_parts", "sft.max_steps=6")
            assert run_program(f"stage={stage}", *arguments) == 0, (name, stage)
    return directory


@pytest.mark.parametrize("name", BEFORE_QAT)
def test_qat_of_the_bf16_parts_keeps_the_rounded_experts(name: str, qat_runs: Path) -> None:
    is_packed = name not in ("nvfp4", "importance")
    kind = Kind.packed if is_packed else Kind.checkpoint
    before, after = (artifacts.load(qat_runs / name / stage) for stage in ("quantize", "qat"))
    assert (before.kind, after.kind) == (kind, kind) and before.fake_quantized == after.fake_quantized is not None
    weights = [loading.Weights(references.of_artifact(artifact)) for artifact in (before, after)]
    names = weights[0].names()
    same = {each for each in names if torch.equal(*(model.read_effective(each).float() for model in weights))}
    experts = {each for each in names if each.endswith(EXPERT_WEIGHTS)}
    assert experts <= same and len(same - experts) < len(names) / 2  # in BF16, a few steps do not move every norm
    assert "FAILED" not in outcomes(qat_runs / name)


def test_qat_of_the_bf16_parts_lowers_the_loss_of_the_rounded_model(qat_runs: Path) -> None:
    details = artifacts.load(qat_runs / "after full SFT" / "qat").details
    assert details["validation_loss"] < details["validation_loss_before"] and details["quantizers"] == 4


def test_an_interrupted_qat_of_the_bf16_parts_resumes_to_the_same_weights(qat_runs: Path, tmp_path: Path) -> None:
    whole = qat_runs / "in mixed precision"
    run_dir = linked(tmp_path / "run", whole, "upcast", "sft", "quantize")
    settings = (*SHORT, *BEFORE_QAT[whole.name], "train@qat=bf16_parts", "sft.max_steps=6")
    line = Line(["stage=qat", f"run_dir={run_dir}", *settings], interrupted_at=3)
    assert run(line)["status"] == 130
    assert run(replace(line, interrupted_at=None))["status"] == 0
    assert weight_bytes(run_dir / "qat") == weight_bytes(whole / "qat")


def weight_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


MISTAKES = {
    "upcast.experts=bf16": "sft.method=bf16_parts does not train the experts' weights",
    "quantize.source=upcast train@qat=bf16_parts": "there is nothing to round. Use train@sft=bf16_parts",
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_settings_that_contradict_bf16_parts_are_refused(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program("stage=all", f"run_dir={tmp_path}", *SETTINGS, *setting.split()) == 2
    error = capsys.readouterr().err
    assert MISTAKES[setting] in error and error.count("error: ") == 1


def test_an_upcast_with_decoded_experts_and_adapters_as_the_model_are_refused(
    smoke_run: Path, lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = linked(tmp_path / "run", smoke_run, "source", "upcast")
    assert run_program("stage=sft", f"run_dir={run_dir}", *SETTINGS) == 2
    assert "are not packed" in (error := capsys.readouterr().err) and "upcast.experts=null overwrite=true" in error
    assert run_program("stage=upcast", f"run_dir={tmp_path}", *SETTINGS, f"model.path={lora_run / 'sft'}") == 2
    assert "holds adapters" in capsys.readouterr().err
