"""Untouched weights keep the source's bytes. The export reports exact figures about changed weights."""

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, linked, outcomes, run_program
from run_files import source_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pipeline.checkpoints import shards
from pipeline.checkpoints.reading import Checkpoint
from pipeline.models import references
from pipeline.models.weights import Weights
from pipeline.runs import artifacts

QUICK = (*SHORT, "sft.max_steps=6", "qat.max_steps=3")
ADAPTERS = tuple(
    f"{stage}.lora.{setting}" for stage in ("sft", "qat") for setting in ("layers=[1]", "targets=[experts]")
)
LORA = ("recipe=smoke_lora", *QUICK, *ADAPTERS)
MSE = ("recipe=smoke", *QUICK, "format.scale_rule=mse")
UNTOUCHED = "untouched tensors"
COUNTS = ("moved_weights", "changed_codes", "changed_scales", "survival", "saturated_blocks")
SUMS = ("relative_squared_error", "snr_db")

Tensors = dict[str, Tensor]


def run_stages(stages: Iterable[str], run_dir: Path, *arguments: str) -> None:
    for stage in stages:
        assert run_program(f"stage={stage}", f"run_dir={run_dir}", *arguments) == 0, stage


@pytest.fixture(scope="module")
def layer_one(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters only on the experts of layer 1. Tests must not write to it."""
    run_dir = linked(tmp_path_factory.mktemp("layer_one") / "run", smoke_run, "source", "upcast")
    run_stages(("sft", "quantize", "qat", "export", "verify"), run_dir, *LORA)
    return run_dir


@pytest.fixture(scope="module")
def mse(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained every weight, with the scale rule mse. Tests must not write to it."""
    run_dir = linked(tmp_path_factory.mktemp("mse") / "run", smoke_run, "source", "upcast", "sft")
    run_stages(("quantize", "qat", "export", "verify"), run_dir, *MSE)
    return run_dir


def copy_run(run: Path, into: Path, *stages: str) -> Path:
    """Copy the source model and some stages from the run directory `run` to the run directory `into`."""
    for name in ("source", *stages):
        shutil.copytree(run / name, into / name, symlinks=True)
    return into


def read_tensors(directory: Path) -> Tensors:
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


def details_of(stage: Path) -> dict[str, Any]:
    return artifacts.load(stage).details


def status_of(verify: Path, title: str) -> str:
    checks = json.loads((verify / "report.json").read_text())["checks"]
    return next(check["status"] for check in checks if check["title"].startswith(title))


def experts_in(tensors: Iterable[str]) -> list[str]:
    return sorted(name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks"))


# Bytes of tensors.


def test_the_export_of_the_upcast_is_the_source_byte_for_byte(layer_one: Path, tmp_path: Path) -> None:
    run = copy_run(layer_one, tmp_path / "run", "upcast")
    run_stages(("export", "verify"), run, *LORA, "export.source=upcast")
    source, export = read_tensors(source_of(run)), read_tensors(run / "export")
    assert export.keys() == source.keys()
    assert [name for name in source if not same_bits(export[name], source[name])] == []
    details = details_of(run / "export")
    assert (details["copied_tensors"], details["encoded_tensors"]) == (len(source), 0)
    assert sorted(details["copied"]) == sorted(source)
    assert details["copied_experts"] == 2 * 2 * 8
    assert [details[name] for name in COUNTS] == [0] * len(COUNTS)
    assert details["relative_squared_error"] == 0
    assert status_of(run / "verify", UNTOUCHED) == "ok"


def test_only_experts_with_an_adapter_lose_the_bytes_of_the_source(layer_one: Path) -> None:
    source, export = read_tensors(source_of(layer_one)), read_tensors(layer_one / "export")
    different = [name for name in source if not same_bits(export[name], source[name])]
    assert sorted(name for name in different if name.endswith("_blocks")) == [
        f"model.layers.1.mlp.experts.{name}_blocks" for name in ("down_proj", "gate_up_proj")
    ]
    assert all(name.startswith("model.layers.1.mlp.experts.") for name in different)
    assert all(name.endswith(("_blocks", "_scales")) for name in different)


@pytest.mark.parametrize("run", ["layer_one", "mse"])
def test_the_artifact_lists_exactly_the_tensors_that_are_the_sources_own(
    run: str, request: pytest.FixtureRequest
) -> None:
    run_dir = request.getfixturevalue(run)
    source, export = read_tensors(source_of(run_dir)), read_tensors(run_dir / "export")
    equal = {name for name in source if same_bits(export[name], source[name])}
    for name in experts_in(source):  # a stack's blocks and scales are copied only together
        pair = {f"{name}_blocks", f"{name}_scales"}
        equal -= pair if not pair <= equal else set()
    details = details_of(run_dir / "export")
    assert sorted(details["copied"]) == sorted(equal)
    assert details["copied_tensors"] == len(equal)
    assert details["encoded_tensors"] == len(source) - len(equal)


def test_copied_experts_are_those_whose_weights_did_not_move(layer_one: Path) -> None:
    qat, upcast = Weights(references.of_artifact(artifacts.load(layer_one / "qat"))), read_tensors(layer_one / "upcast")
    source, export = read_tensors(source_of(layer_one)), read_tensors(layer_one / "export")
    unmoved = [
        (name, expert)
        for name in experts_in(source)
        for expert, weight in enumerate(qat.read_trained(name))
        if same_bits(weight, upcast[name][expert])
    ]
    assert details_of(layer_one / "export")["copied_experts"] == len(unmoved) >= 2 * 8
    for name, expert in unmoved:
        for part in ("blocks", "scales"):
            assert same_bits(export[f"{name}_{part}"][expert], source[f"{name}_{part}"][expert]), (name, expert)


def test_the_proof_covers_the_untouched_tensors(layer_one: Path, mse: Path) -> None:
    for run in (layer_one, mse):
        assert outcomes(run) == {"ok"}
        assert status_of(run / "verify", UNTOUCHED) == "ok"


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_one_flipped_byte_in_an_untouched_tensor_is_found_and_named(part: str, layer_one: Path, tmp_path: Path) -> None:
    run = copy_run(layer_one, tmp_path / "run", "upcast", "sft", "quantize", "qat", "export")
    name = f"model.layers.0.mlp.experts.down_proj_{part}"
    (path,) = (path for path in (run / "export").glob("*.safetensors") if name in load_file(path))
    tensors = load_file(path)
    tensors[name].view(-1)[-1] ^= 1
    save_file(tensors, path, {"format": "pt"})
    assert run_program("stage=verify", f"run_dir={run}", *LORA) == 1
    report = json.loads((run / "verify" / "report.json").read_text())
    (check,) = (check for check in report["checks"] if check["title"].startswith(UNTOUCHED))
    assert check["status"] == "FAILED"
    assert len(check["problems"]) == 1
    assert check["problems"][0].startswith("model.layers.0.mlp.experts.down_proj: ")
    assert not (run / "verify" / artifacts.ARTIFACT_FILE).exists()


def test_experts_that_no_token_reached_are_proven_too(tmp_path: Path) -> None:
    """When an adapter with a delta of zero is merged, -0 becomes 0. The export must have zeros of the same sign."""
    few = ("model.tiny.num_local_experts=32", "model.tiny.num_experts_per_tok=1", "sft.max_steps=2", "sft.batch_size=1")
    run_stages(("upcast", "sft", "export", "verify"), tmp_path, *LORA, *few, "sft.warmup_ratio=0")
    sft, base = Weights(references.of_artifact(artifacts.load(tmp_path / "sft"))), Checkpoint(tmp_path / "upcast")
    name = "model.layers.1.mlp.experts.down_proj"
    moved = (sft.read_trained(name) != base.read_plain(name)).flatten(1).any(dim=1)
    assert moved.any()
    assert not moved.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_directory_in_another_type_is_exported_or_refused(
    dtype: torch.dtype, layer_one: Path, tmp_path: Path, capsys
) -> None:
    """Every floating type of a plain checkpoint represents the values of MXFP4 exactly."""
    run = copy_run(layer_one, tmp_path / "run", "upcast")
    plain = Path(shutil.copytree(run / "upcast", tmp_path / "plain"))
    (plain / artifacts.ARTIFACT_FILE).unlink()
    for path in plain.glob("*.safetensors"):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    status = run_program("stage=export", f"run_dir={run}", *LORA, f"export.source={plain}")
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if status == 0:
        source, export = read_tensors(source_of(run)), read_tensors(run / "export")
        assert [
            name
            for name in experts_in(source)
            if not torch.equal(decode_experts(export, name), decode_experts(source, name))
        ] == []
    else:
        assert status == 2
        assert str(plain) in error


# Figures.


def decode_experts(tensors: Tensors, name: str) -> Tensor:
    """Decode with transformers to (E, in, out) float64."""
    plain = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)
    return plain.double()


def split_blocks(values: Tensor) -> Tensor:
    """Split (E, in, out) into blocks (E, out, nb, 32)."""
    return values.transpose(1, 2).unflatten(2, (-1, 32))


def figures_of(names: list[str], trained: Tensors, source: Tensors, export: Tensors) -> dict[str, Any]:
    """Compute the figures of the export from their definitions, in float64 and integers."""
    error = squares = 0.0
    moved = changed = values = changed_scales = saturated = blocks = 0
    for name in names:
        weight, near, base = trained[name].double(), decode_experts(export, name), decode_experts(source, name)
        error += float((weight - near).square().sum())
        squares += float(weight.square().sum())
        moved += int((weight != base).sum())
        changed += int((near != base).sum())
        values += weight.numel()
        scales, old_scales = export[f"{name}_scales"], source[f"{name}_scales"]
        changed_scales += int(((scales != old_scales) & (split_blocks(near) != split_blocks(base)).any(dim=-1)).sum())
        saturated += int((split_blocks(weight).abs().amax(dim=-1) > 6 * 2.0 ** (scales.double() - 127)).sum())
        blocks += scales.numel()
    return {
        "relative_squared_error": error / squares,
        "snr_db": 10 * math.log10(squares / error) if error else None,  # JSON has no infinity
        "moved_weights": moved / values,
        "changed_codes": changed / values,
        "changed_scales": changed_scales / blocks,
        "survival": changed / moved if moved else 0.0,
        "saturated_blocks": saturated / blocks,
    }


def account_of(names: list[str], trained: Tensors, source: Tensors, export: Tensors) -> dict[str, Any]:
    """Compute the account of rounding from its definition, in float64 and integers."""
    change = product = rest = rounded = base_squares = squares = 0.0
    codes = values = up = down = clipped = blocks = 0
    for name in names:
        weight, near, base = trained[name].double(), decode_experts(export, name), decode_experts(source, name)
        d, r = weight - base, near - base
        change, product, rounded = change + d.square().sum(), product + (d * r).sum(), rounded + r.square().sum()
        base_squares, squares = base_squares + base.square().sum(), squares + weight.square().sum()
        differs = (split_blocks(near) != split_blocks(base)).any(dim=-1)
        scales, old = export[f"{name}_scales"], source[f"{name}_scales"]
        up, down = up + int((differs & (scales > old)).sum()), down + int((differs & (scales < old)).sum())
        largest = 6 * 2.0 ** (scales.double() - 127)
        clipped += int((split_blocks(weight).abs() > largest.unsqueeze(-1)).sum())
        codes, values, blocks = codes + int((near != base).sum()), values + weight.numel(), blocks + scales.numel()
    kept = float(product / change) if change else None
    for name in names:
        weight, near, base = trained[name].double(), decode_experts(export, name), decode_experts(source, name)
        rest += float((near - base - (kept or 0) * (weight - base)).square().sum())
    return {
        "relative_change": math.sqrt(change / base_squares),
        "kept": kept,
        "noise": math.sqrt(rest / squares),
        "changed_codes": codes / values,
        "changed_scales": (up + down) / blocks,
        "scales_up": up / blocks,
        "scales_down": down / blocks,
        "clipped_values": clipped,
        "adjusted_blocks": 0,
    }


def assert_account(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.pop("kept") == (None if expected["kept"] is None else pytest.approx(expected.pop("kept"), rel=1e-5))
    expected.pop("kept", None)
    assert found == pytest.approx(expected, rel=1e-5)


def assert_figures(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: found[name] for name in COUNTS} == {name: expected[name] for name in COUNTS}
    for name in SUMS:
        same = expected[name] if expected[name] is None else pytest.approx(expected[name], rel=1e-6)
        assert found[name] == same, name


def trained_of(run: Path) -> Tensors:
    """Return the expert weights after training: with merged adapters, or as stored."""
    qat = artifacts.load(run / "qat")
    if qat.kind is artifacts.Kind.checkpoint:
        return read_tensors(qat.directory)
    weights = Weights(references.of_artifact(qat))
    return {name: weights.read_trained(name) for name in weights.names() if ".experts." in name}


@pytest.mark.parametrize("run", ["layer_one", "mse"])
def test_the_figures_are_those_of_the_files(run: str, request: pytest.FixtureRequest) -> None:
    run_dir = request.getfixturevalue(run)
    trained, source, export = trained_of(run_dir), read_tensors(source_of(run_dir)), read_tensors(run_dir / "export")
    expected = figures_of(experts_in(source), trained, source, export)
    assert 0 < expected["survival"] < 1
    assert 0 < expected["relative_squared_error"] < 0.05
    assert (expected["saturated_blocks"] > 0) == (run == "mse")
    assert_figures(details_of(run_dir / "export"), expected)
    account = account_of(experts_in(source), trained, source, export)
    assert account["scales_down"] > 0 and (account["scales_up"] > 0) == (run != "mse")
    assert (account["clipped_values"] > 0) == (run == "mse")
    assert_account(details_of(run_dir / "export")["account"], account)


@pytest.mark.parametrize("run", ["layer_one", "mse"])
def test_the_figures_of_each_layer_are_those_of_its_files_and_make_up_the_whole(
    run: str, request: pytest.FixtureRequest
) -> None:
    run_dir = request.getfixturevalue(run)
    trained, source, export = trained_of(run_dir), read_tensors(source_of(run_dir)), read_tensors(run_dir / "export")
    lines = [json.loads(line) for line in (run_dir / "export" / "metrics.jsonl").read_text().splitlines()]
    layers = [line for line in lines if "layer" in line]
    assert [line["layer"] for line in layers] == [0, 1]
    for line in layers:
        names = [name for name in experts_in(source) if name.startswith(f"model.layers.{line['layer']}.")]
        assert_figures(line, figures_of(names, trained, source, export))
        account = account_of(names, trained, source, export)
        assert_account({name: line[name] for name in account}, account)
    (whole,) = (line for line in lines if "layer" not in line)
    # layers have the same size, so the whole is their mean
    for name in ("moved_weights", "changed_codes", "changed_scales", "saturated_blocks"):
        assert whole[name] == pytest.approx(sum(line[name] for line in layers) / 2, rel=1e-12)
    assert whole["survival"] == pytest.approx(whole["changed_codes"] / whole["moved_weights"], rel=1e-12)
    details = details_of(run_dir / "export")
    assert all(details[name] == whole[name] for name in (*COUNTS, *SUMS, "copied_tensors", "encoded_tensors"))


def test_the_records_of_the_export_are_strict_json(layer_one: Path) -> None:
    """Python writes infinity as `Infinity`, which other JSON readers reject."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((layer_one / "export" / artifacts.ARTIFACT_FILE).read_text(), parse_constant=refuse)
    for line in (layer_one / "export" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize(("rate", "is_lost"), [(1e-7, True), (2e-2, False)])
def test_a_warning_appears_only_if_rounding_undoes_the_fine_tuning(
    rate: float, is_lost: bool, mse: Path, tmp_path: Path, capsys
) -> None:
    run = copy_run(mse, tmp_path / "run", "upcast")
    run_stages(("sft", "export"), run, "recipe=smoke", *QUICK, f"sft.learning_rate={rate}", "export.source=sft")
    details = details_of(run / "export")
    assert details["moved_weights"] > 0.5
    assert (details["survival"] < 0.05) == is_lost
    error = capsys.readouterr().err
    assert ("hardly any of the fine-tuning of the experts reached the 4-bit weights" in error) == is_lost
    assert (f"{details['survival']:.2%} of the moved weights still differ" in error) == is_lost


def test_an_untrained_model_gives_no_warning(mse: Path, tmp_path: Path, capsys) -> None:
    run_stages(("export",), copy_run(mse, tmp_path / "run", "upcast"), *MSE, "export.source=upcast")
    assert "hardly any" not in capsys.readouterr().err


def test_a_resumed_export_ends_with_the_same_files_and_figures(
    layer_one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*LORA, "export.shard_bytes=60000")
    whole, resumed = (
        copy_run(layer_one, tmp_path / name, "upcast", "sft", "quantize", "qat") for name in ("whole", "resumed")
    )
    run_stages(("export",), whole, *arguments)
    publish = shards._Output.publish

    def interrupt(self: Any, i: int) -> None:
        if i == 5:
            raise KeyboardInterrupt
        publish(self, i)

    monkeypatch.setattr(shards._Output, "publish", interrupt)
    assert run_program("stage=export", f"run_dir={resumed}", *arguments) == 130
    assert len(list((resumed / "export" / "mxfp4").glob("*.safetensors"))) == 5
    monkeypatch.undo()
    run_stages(("export",), resumed, *arguments)
    one, other = artifacts.load(whole / "export"), artifacts.load(resumed / "export")
    assert len(one.files) > 8
    assert one.fingerprint == other.fingerprint
    unlike = {name for name in one.details if one.details[name] != other.details[name]}
    assert unlike <= {"exported_directory"}
    assert other.fingerprint == artifacts.fingerprint_of(resumed / "export")[0]


# Scale rules.


def test_artifacts_of_training_and_export_record_the_scale_rule(layer_one: Path, mse: Path) -> None:
    for run, rule in ((layer_one, "ceil"), (mse, "mse")):
        for stage in ("quantize", "qat"):
            record = artifacts.load(run / stage)
            assert (record.fake_quantized, record.scale_rule) == ("mxfp4", rule)
        export = artifacts.load(run / "export")
        assert (export.format, export.fake_quantized, export.scale_rule) == ("mxfp4", None, rule)
        assert artifacts.load(run / "upcast").scale_rule is None


@pytest.mark.parametrize("source", ["quantize", "qat"])
def test_another_rule_than_the_trained_one_is_refused(source: str, mse: Path, tmp_path: Path, capsys) -> None:
    run = copy_run(mse, tmp_path / "run", "upcast", "sft", "quantize", "qat")
    arguments = ("recipe=smoke", *QUICK, f"run_dir={run}", f"export.source={source}")
    assert run_program("stage=export", *arguments, "format.scale_rule=ceil") == 2
    message = capsys.readouterr().err
    assert message.count("error: ") == 1
    assert "Traceback" not in message
    assert "scale_rule=mse" in message
    assert "scale_rule=ceil" in message
    assert not (run / "export").exists()
    assert run_program("stage=export", *arguments, "format.scale_rule=mse") == 0
