"""The forward pass, the export and QAT keep the rounded experts of `quantize` to the bit. Mistakes are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ONE_LAYER, SHORT, error_of, linked, outcomes, quantized_runs, run_program
from safetensors.torch import load_file, save_file

from pipeline.checkpoints.gpt_oss import expert_projections, packed_names
from pipeline.checkpoints.reading import Checkpoint
from pipeline.models import fake_quantizers, references
from pipeline.models.references import ModelRef
from pipeline.models.weights import Weights
from pipeline.numerics.codec import same_bits
from pipeline.runs import artifacts
from pipeline.runs.artifacts import Artifact, Kind
from pipeline.runs.metrics import read_metrics

FULL = ("recipe=smoke", *SHORT, "qat.max_steps=3")
LORA = ("recipe=smoke_lora", *SHORT, *ONE_LAYER, "qat.max_steps=3")
STOCHASTIC = "quantize.method=stochastic"
CASES = {
    "full-mxfp4": (*FULL, STOCHASTIC),
    "full-nvfp4": (*FULL, STOCHASTIC, "format=nvfp4", "export.target=nvfp4"),
    "full-mxfp4-mse": (*FULL, STOCHASTIC, "quantize.scales=mse"),
    "full-nvfp4-floor": (*FULL, STOCHASTIC, "quantize.scales=floor", "format=nvfp4", "export.target=nvfp4"),
    "full-nearest-base": (*FULL, "quantize.scales=base"),
    "lora-mxfp4": (*LORA, STOCHASTIC),
    "lora-nvfp4": (*LORA, STOCHASTIC, "format=nvfp4", "export.target=nvfp4"),
}


@pytest.fixture(scope="module")
def quantized(
    smoke_run: Path, lora_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, tuple[str, ...]]]:
    return quantized_runs(CASES, smoke_run, lora_run, tmp_path_factory)


def load(run: Path) -> Artifact:
    return artifacts.load(run / "quantize")


def model_of(run: Path) -> ModelRef:
    return references.of_artifact(load(run))


@pytest.mark.parametrize("case", CASES)
def test_the_forward_pass_leaves_the_rounded_experts_as_they_are(case: str, quantized) -> None:
    run, _ = quantized(case)
    ref = model_of(run)
    weights = Weights(ref)
    for projection in expert_projections(weights.shape):
        assert same_bits(weights.read_effective(projection.name), weights.read_trained(projection.name))


@pytest.mark.parametrize("case", ["full-mxfp4", "lora-mxfp4"])
def test_interrupted_rounding_resumes_to_the_same_files_and_lines(
    case: str, quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experts are written. The interruption comes while quantizers are inserted."""
    whole, settings = quantized(case)
    run = linked(tmp_path / "run", whole, "source", "upcast", "sft")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fake_quantizers, "insert", interrupt)
        assert run_program("stage=quantize", f"run_dir={run}", *settings) == 130
    assert run_program("stage=quantize", f"run_dir={run}", *settings) == 0
    assert load(run).files.keys() == load(whole).files.keys()
    for name in load(whole).files.keys() - {"README.md", "adapter_config.json"}:  # PEFT writes the base's path in these
        assert (run / "quantize" / name).read_bytes() == (whole / "quantize" / name).read_bytes(), name
    lines = [[line | {"time": 0} for line in read_metrics(each / "quantize")] for each in (whole, run)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("case", ["full-mxfp4", "full-nvfp4", "lora-mxfp4", "lora-nvfp4"])
def test_an_export_of_the_rounded_model_is_verified_to_the_bit(case: str, quantized) -> None:
    run, settings = quantized(case)
    for stage in ("export", "verify"):
        assert run_program(f"stage={stage}", f"run_dir={run}", *settings, "export.source=quantize") == 0, stage
    assert outcomes(run) <= {"ok", "not checked"}  # transformers does not load NVFP4
    exported, account = artifacts.load(run / "export").details, load(run).details["account"]
    assert exported["relative_squared_error"] == 0
    assert exported["changed_codes"] == pytest.approx(account["changed_codes"])


def test_a_lora_student_on_a_rounded_base_learns_from_the_sft_model(lora_run: Path, quantized, tmp_path: Path) -> None:
    run, settings = quantized("lora-mxfp4")
    here = linked(tmp_path / "run", lora_run, "source", "upcast", "sft")
    (here / "quantize").symlink_to(run / "quantize")
    assert run_program("stage=qat", f"run_dir={here}", *settings, "qat.distillation.weight=0.5") == 0
    lines = [line for line in read_metrics(here / "qat") if "teacher_divergence" in line]
    assert lines and all(line["teacher_divergence"] > 0 for line in lines)


def assert_divergence_from_sft(run: Path) -> None:
    details = artifacts.load(run / "evaluate").details
    figures = details["results"]["quantize"]
    assert details["reference"] == "sft"
    assert 0 < figures["kl_divergence_low"] < figures["kl_divergence"] < figures["kl_divergence_high"] < 1
    assert figures["relative_weight_error"] > 0


@pytest.mark.parametrize("case", ["full-nvfp4", "full-mxfp4-mse", "full-nearest-base"])
def test_the_rounded_model_is_compared_with_the_sft_model(case: str, quantized) -> None:
    """`test_qat_starts_from_the_rounded_model` does the same for other cases."""
    run, settings = quantized(case)
    assert run_program("stage=evaluate", f"run_dir={run}", *settings, "evaluate.source=quantize") == 0
    assert_divergence_from_sft(run)


def test_a_packed_model_is_compared_with_the_sft_model_that_has_adapters(lora_run: Path, tmp_path: Path) -> None:
    run = linked(tmp_path / "run", lora_run, "source", "upcast", "sft")
    for stage in ("quantize", "evaluate"):
        settings = (*LORA, "train@qat=bf16_parts", "evaluate.source=quantize")
        assert run_program(f"stage={stage}", f"run_dir={run}", *settings) == 0, stage
    assert load(run).kind is Kind.packed
    assert_divergence_from_sft(run)


@pytest.mark.parametrize("case", ["full-mxfp4", "lora-mxfp4", "lora-nvfp4"])
def test_qat_starts_from_the_rounded_model(case: str, quantized) -> None:
    run, settings = quantized(case)
    for stage in ("qat", "evaluate"):
        assert run_program(f"stage={stage}", f"run_dir={run}", *settings, "evaluate.source=all") == 0, stage
    results = artifacts.load(run / "evaluate").details["results"]
    assert_divergence_from_sft(run)
    qat = artifacts.load(run / "qat").details
    assert results["quantize"]["validation_loss"] == pytest.approx(qat["validation_loss_before"], rel=1e-4)
    assert qat["validation_loss"] < qat["validation_loss_before"]


def test_lora_gets_new_adapters_on_a_rounded_base_that_is_packed_in_mxfp4(quantized) -> None:
    for case, is_packed in (("lora-mxfp4", True), ("lora-nvfp4", False)):
        run, _ = quantized(case)
        ref = model_of(run)
        assert load(run).kind is Kind.adapter and ref.base == run / "quantize" / "base"
        assert Checkpoint(ref.base).is_packed == ref.is_packed == is_packed
        factors = load_file(run / "quantize" / "adapter_model.safetensors")
        assert all(not bool(factor.any()) for name, factor in factors.items() if "lora_B" in name)


def test_a_plain_checkpoint_has_the_rounded_experts_and_the_other_tensors_of_sft(quantized, smoke_run: Path) -> None:
    run, _ = quantized("full-mxfp4")
    found, before = Weights(model_of(run)), Weights(references.of_artifact(artifacts.load(smoke_run / "sft")))
    experts = {projection.name for projection in expert_projections(found.shape)}
    for name in found.names():
        assert same_bits(found.read_trained(name), before.read_trained(name)) == (name not in experts)


@pytest.mark.parametrize("case", ["full-mxfp4", "full-nearest-base", "lora-mxfp4"])
def test_the_scales_are_those_of_the_packed_base(case: str, quantized) -> None:
    """So each rounded weight, divided by the base's scale, is a value of e2m1."""
    run, _ = quantized(case)
    (source,) = (run / "source").iterdir()
    weights, base = Weights(model_of(run)), Checkpoint(source)
    for projection in expert_projections(weights.shape):
        scales = (base.read(packed_names(projection.name)[1]).int() - 127).double().exp2()
        blocks = weights.read_trained(projection.name).transpose(1, 2).double().unflatten(-1, (-1, 32))
        found = (blocks / scales.unsqueeze(-1)).abs().unique().tolist()
        assert set(found) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    assert load(run).details["scales"] == "base"
    assert load(run).details["account"]["changed_scales"] == 0


def test_the_result_depends_on_the_seed_alone(quantized, smoke_run: Path, tmp_path: Path) -> None:
    run, settings = quantized("full-mxfp4")
    found = []
    for seed in (42, 43):
        again = linked(tmp_path / str(seed), smoke_run, "source", "upcast", "sft")
        assert run_program("stage=quantize", f"run_dir={again}", *settings, f"quantize.seed={seed}") == 0
        found.append(load(again).fingerprint)
    assert found[0] == load(run).fingerprint != found[1]


def test_stochastic_rounding_keeps_the_change_on_average(quantized, smoke_run: Path) -> None:
    account = load(quantized("full-mxfp4")[0]).details["account"]
    nearest = load(quantized("full-nearest-base")[0]).details["account"]
    assert account["kept"] == pytest.approx(1, abs=0.05)
    assert account["relative_change"] == nearest["relative_change"] > 0
    assert account["noise"] > nearest["noise"]


def test_the_account_of_nearest_rounding_is_that_of_the_forward_pass(smoke_run: Path) -> None:
    ref = references.of_artifact(artifacts.load(smoke_run / "quantize"))
    weights, base = Weights(ref), Checkpoint(smoke_run / "upcast")
    change = rounded = product = 0.0
    for projection in expert_projections(weights.shape):
        before = base.read_plain(projection.name).double()
        d, r = (read(projection.name).double() - before for read in (weights.read_trained, weights.read_effective))
        change, rounded, product = change + d.square().sum(), rounded + r.square().sum(), product + (d * r).sum()
    details = artifacts.load(smoke_run / "quantize").details
    assert details["account"]["kept"] == pytest.approx(float(product / change), rel=1e-4)
    assert (details["method"], details["scales"]) == ("nearest", "ceil")


def test_the_metrics_have_the_account_of_each_layer(quantized) -> None:
    run, _ = quantized("full-mxfp4")
    lines = [line for line in read_metrics(run / "quantize") if "kept" in line]
    assert [line.get("layer") for line in lines] == [0, 1, None]
    assert all(0.5 < line["kept"] < 1.5 and line["noise"] > 0 for line in lines)


# Mistakes.


@pytest.mark.parametrize("seed", ["abc", "1.5", "-1", "4294967296"])
def test_a_seed_that_is_not_a_whole_number_of_32_bits_is_refused(seed: str, tmp_path: Path, capsys) -> None:
    message = error_of(capsys, "stage=quantize", *FULL, f"run_dir={tmp_path / 'run'}", f"quantize.seed={seed}")
    assert "quantize.seed" in message and seed in message
    assert not (tmp_path / "run").exists()


def test_scales_of_a_base_that_is_not_packed_are_refused(smoke_run: Path, tmp_path: Path, capsys) -> None:
    settings = (*FULL, "quantize.source=upcast", f"model.path={smoke_run / 'upcast'}", f"run_dir={tmp_path / 'run'}")
    assert run_program("stage=upcast", *settings) == 0
    message = error_of(capsys, "stage=quantize", *settings, "quantize.scales=base")
    assert "quantize.scales=base" in message and "not packed" in message and "ceil, floor or mse" in message
    assert not (tmp_path / "run" / "quantize").exists()
    assert run_program("stage=quantize", *settings, STOCHASTIC) == 0
    assert load(tmp_path / "run").details["scales"] == "ceil"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float, smoke_run: Path, tmp_path: Path, capsys) -> None:
    run = linked(tmp_path / "run", smoke_run, "source", "upcast")
    (run / "sft").mkdir()
    for path in (smoke_run / "sft").iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            (run / "sft" / path.name).hardlink_to(path)
    (weights,) = (smoke_run / "sft").glob("model*.safetensors")
    tensors = load_file(weights)
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name][2, 40, 3] = bad
    save_file(tensors, run / "sft" / weights.name, {"format": "pt"})
    artifact = json.loads((run / "sft" / "artifact.json").read_text())
    artifact["files"][weights.name] = (run / "sft" / weights.name).stat().st_size
    (run / "sft" / "artifact.json").unlink()
    (run / "sft" / "artifact.json").write_text(json.dumps(artifact))
    message = error_of(capsys, "stage=quantize", f"run_dir={run}", *FULL, STOCHASTIC)
    assert f"{name}: expert 2, row 3, block 1: NaN or Inf" in message
    assert not (run / "quantize" / artifacts.ARTIFACT_FILE).exists()


@pytest.mark.parametrize("setting", ["format.scale_rule=nearest", "format.importance=true"])
def test_a_rule_of_nvfp4_that_would_change_rounded_weights_is_refused(setting: str, tmp_path: Path, capsys) -> None:
    message = error_of(
        capsys, "stage=quantize", *FULL, f"run_dir={tmp_path / 'run'}", STOCHASTIC, "format=nvfp4", setting
    )
    assert "quantize.method=stochastic" in message and setting in message.replace("not nearest", setting)
    assert not (tmp_path / "run").exists()
