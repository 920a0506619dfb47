"""Adapters that PEFT saved take the place of SFT: quantize.source=<directory>."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import SHORT, linked, run_program
from safetensors.torch import load_file, save_file

from pipeline.checkpoints.side_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pipeline.models import loading
from pipeline.runs import artifacts

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FULL = ("recipe=smoke", *SHORT, "qat.max_steps=2", "quantize.calibration_samples=16")
LORA = ("recipe=smoke_lora", *SHORT, "sft.precision=bf16", "qat.max_steps=2")
PROVEN = "adapters: merged weights equal base + scaling * B A, recomputed in FP32 without PEFT"


@pytest.fixture(scope="module")
def save(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that saves adapters of the tiny model with PEFT, and returns their directory."""

    def save(**settings: Any) -> Path:
        directory: Path = tmp_path_factory.mktemp("adapters") / "adapters"
        config = peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **settings})
        model = peft.get_peft_model(loading.load_plain(tiny, torch.bfloat16), config)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.02 * torch.randn_like(parameter)
        model.save_pretrained(str(directory))
        return directory

    return save


@pytest.fixture(scope="module")
def adapters(save: Callable[..., Path]) -> Path:
    return save(target_modules=ATTENTION, target_parameters=EXPERTS)


@pytest.fixture(scope="module")
def upcast(tiny: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the upcast of the tiny model alone. Tests must not write to it."""
    run: Path = tmp_path_factory.mktemp("upcast") / "run"
    assert run_program("stage=upcast", *FULL, *asked(run, tiny, adapters)) == 0
    return run


def asked(run: Path, tiny: Path, adapters: Path) -> tuple[str, ...]:
    return (f"run_dir={run}", f"model.path={tiny}", f"quantize.source={adapters}")


def tensors(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def statuses(run: Path) -> dict[str, str]:
    report = json.loads((run / "verify" / "report.json").read_text(encoding="utf-8"))
    return {check["title"]: check["status"] for check in report["checks"]}


@pytest.mark.parametrize("block_format", [(), ("format=nvfp4", "export.target=nvfp4")], ids=["mxfp4", "nvfp4"])
def test_nearest_rounding_of_adapters_exports_the_bytes_of_export_source(
    block_format: tuple[str, ...], tiny: Path, adapters: Path, upcast: Path, tmp_path: Path
) -> None:
    run = linked(tmp_path / "run", upcast, "upcast")
    for stage in ("quantize", "export", "verify"):
        assert run_program(f"stage={stage}", *FULL, *asked(run, tiny, adapters), *block_format) == 0, stage
    assert statuses(run)[PROVEN] == "ok" and "FAILED" not in statuses(run).values()
    other = (f"run_dir={tmp_path / 'other'}", f"model.path={tiny}", f"export.source={adapters}", *block_format)
    assert run_program("stage=export", "recipe=smoke", *other) == 0
    assert tensors(run / "export") == tensors(tmp_path / "other" / "export")
    made = artifacts.load(run / "quantize")
    assert {*made.parents} == {"sft", "upcast"} and made.details["adapters"] == str(adapters)


def test_all_stages_go_on_from_adapters_of_another_program(
    tiny: Path, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = (*FULL, "quantize.method=gptq", *asked(run, tiny, adapters))
    assert run_program("stage=all", *settings) == 0, capsys.readouterr().err
    shown = capsys.readouterr()
    assert f"[sft] skipped, because quantize.source={adapters}" in shown.out
    assert "nothing has been fine-tuned" not in shown.err
    assert not (run / "sft").exists()
    assert statuses(run)[PROVEN] == "ok" and "FAILED" not in statuses(run).values()
    rows = json.loads((run / "compare" / "compare.json").read_text())["rows"]
    roles = {row["model"]: row["role"] for row in rows}
    assert roles["sft"] == "SFT (adapters of another program)"
    assert roles["quantize"] == "SFT + PTQ (gptq)" and roles["qat"] == "SFT + QAT"
    assert all("loss_change" in row for row in rows if row["model"] in ("quantize", "qat", "export"))
    needs = artifacts.load(run / "doctor").details["needs"]
    assert needs["disk_bytes"]["sft"] == 0 and {*needs["device_bytes"]} == {"qat"}
    assert run_program("stage=all", f"run_dir={run}") == 0  # the run has recorded its settings
    assert "up to date" in capsys.readouterr().out


def own_sft(run: Path, adapters: Path) -> None:
    """Give the weights of other adapters to the SFT of a run, with its own names and settings."""
    sft = run / "sft"
    theirs, own = load_file(adapters / ADAPTER_WEIGHTS), load_file(sft / ADAPTER_WEIGHTS)
    assert {name: each.shape for name, each in theirs.items()} == {name: each.shape for name, each in own.items()}
    save_file(theirs, sft / ADAPTER_WEIGHTS, {"format": "pt"})
    path = sft / artifacts.ARTIFACT_FILE
    record = json.loads(path.read_text())
    record["files"][ADAPTER_WEIGHTS] = (sft / ADAPTER_WEIGHTS).stat().st_size
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_adapters_give_the_bytes_of_an_own_sft_with_their_weights(
    method: str, tiny: Path, adapters: Path, tmp_path: Path, own_run: Path
) -> None:
    rounding = (*LORA, f"quantize.method={method}", "quantize.calibration_samples=8", f"model.path={tiny}")
    own = linked(tmp_path / "own", own_run, "upcast")
    shutil.copytree(own_run / "sft", own / "sft")
    own_sft(own, adapters)
    foreign = linked(tmp_path / "foreign", own_run, "upcast")
    for stage in ("quantize", "export"):
        assert run_program(f"stage={stage}", *rounding, f"run_dir={own}") == 0
        assert run_program(f"stage={stage}", *rounding, *asked(foreign, tiny, adapters)) == 0
        assert tensors(foreign / stage) == tensors(own / stage)
        assert tensors(foreign / stage / "base") == tensors(own / stage / "base")
    assert artifacts.load(foreign / "quantize").kind is artifacts.Kind.adapter


@pytest.fixture(scope="module")
def own_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an SFT of its own, of adapters. Tests must not write to it."""
    run: Path = tmp_path_factory.mktemp("own") / "run"
    for stage in ("upcast", "sft"):
        assert run_program(f"stage={stage}", *LORA, "sft.max_steps=1", f"run_dir={run}", f"model.path={tiny}") == 0
    return run


def test_qat_continues_with_adapters_and_distils_from_them(
    tiny: Path, adapters: Path, upcast: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = Path(shutil.copytree(adapters, tmp_path / "given"))
    halved = {name: each.bfloat16() for name, each in load_file(adapters / ADAPTER_WEIGHTS).items()}
    save_file(halved, given / ADAPTER_WEIGHTS, {"format": "pt"})
    run = tmp_path / "run"
    settings = (*LORA, *asked(run, tiny, given), "qat.distillation.weight=0.5", "qat.router_aux_loss_coef=0")
    for stage in ("upcast", "quantize", "qat", "export", "verify"):
        assert run_program(f"stage={stage}", *settings) == 0, (stage, capsys.readouterr().err)
    assert statuses(run)[PROVEN] == "ok" and "FAILED" not in statuses(run).values()
    copied = load_file(run / "quantize" / ADAPTER_WEIGHTS)
    assert all(torch.equal(copied[name], each.float()) for name, each in halved.items())
    stored = json.loads((run / "quantize" / ADAPTER_CONFIG).read_text())
    assert stored["base_model_name_or_path"] == "../upcast"
    save_file({name: 2 * each for name, each in halved.items()}, given / ADAPTER_WEIGHTS, {"format": "pt"})
    assert run_program("stage=qat", *settings) == 2
    assert "was made from other adapters than quantize.source=" in capsys.readouterr().err
    assert run_program("stage=quantize", *settings) == 2
    assert "is complete, but was made with other inputs" in capsys.readouterr().err


def test_mistakes_are_named_before_the_first_stage(
    tiny: Path, save: Callable[..., Path], adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = Path(shutil.copytree(adapters, tmp_path / "pickled"))
    (pickled / ADAPTER_WEIGHTS).rename(pickled / "adapter_model.bin")
    (tmp_path / "empty").mkdir()
    attention = save(target_modules=ATTENTION)
    continuing = ("recipe=smoke_lora",)
    cases: list[tuple[Path | str, tuple[str, ...], str]] = [
        ("stf", (), "neither a stage (sft, upcast) nor a directory of adapters. Did you mean 'sft'?"),
        (tmp_path / "no such", (), "neither a stage (sft, upcast) nor a directory. Give the directory of adapters"),
        (adapters / ADAPTER_CONFIG, (), "is a file. Give the directory that holds adapter_config.json"),
        (tmp_path / "empty", (), "has no adapter_config.json. Give the directory"),
        (tiny, (), "holds a whole model, not adapters. Give it as model.path, with quantize.source=upcast"),
        (pickled, (), "are in PyTorch's format (adapter_model.bin), not in safetensors"),
        (attention, (), "there is nothing to round. The adapters do not change the experts"),
        (adapters, ("model.tiny.hidden_size=32", "model.path=synthetic://tiny"), "but the base model needs"),
        (
            save(r=4, lora_alpha=8, target_modules=ATTENTION, target_parameters=EXPERTS),
            continuing,
            "their rank is 4, and qat.lora.rank=8. Set qat.lora.rank=4 qat.lora.alpha=8"
            " qat.lora.targets=[attention,experts] qat.lora.layers=null qat.lora.every_nth=null. Or set"
            " quantize.method=stochastic or gptq.",
        ),
        (
            save(target_modules=["q_proj"], target_parameters=EXPERTS),
            continuing,
            "which qat.lora does. qat.lora cannot describe them. Set quantize.method=stochastic or gptq.",
        ),
    ]
    run = tmp_path / "run"
    for source, more, told in cases:
        for stage in ("all",) if more else ("all", "doctor"):
            settings = (*FULL, *asked(run, tiny, f"'{source}'"), *more)  # type: ignore[arg-type]
            assert run_program(f"stage={stage}", *settings) == 2, (source, stage)
            error = capsys.readouterr().err
            assert f"quantize.source={source}: " in error or source == pickled or "needs" in told, error
            assert told in error, error
    assert not (run / "upcast").exists()


def test_a_run_has_one_sft(
    own_run: Path, tiny: Path, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = linked(tmp_path / "run", own_run, "upcast", "sft")
    assert run_program("stage=quantize", *LORA, *asked(run, tiny, adapters)) == 2
    assert "the run has an SFT of its own" in capsys.readouterr().err
    assert run_program("stage=sft", *LORA, *asked(tmp_path / "other", tiny, adapters)) == 2
    assert "these adapters are the run's SFT. To run stage=sft, set it to sft." in capsys.readouterr().err
    stage = (f"run_dir={tmp_path / 'other'}", f"model.path={tiny}", f"quantize.source={own_run / 'sft'}")
    assert run_program("stage=doctor", *LORA, *stage) == 2
    assert "is a stage of a run. Go on in that run with quantize.source=sft" in capsys.readouterr().err


def test_a_relative_path_of_adapters_is_found_from_another_directory(
    tiny: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(adapters, tmp_path / "mine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    for stage in ("upcast", "quantize"):
        assert run_program(f"stage={stage}", *FULL, *asked(tmp_path / "run", tiny, Path("mine"))) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert run_program("stage=quantize", f"run_dir={tmp_path / 'run'}") == 0
    assert "up to date" in capsys.readouterr().out
    assert run_program("stage=evaluate", f"run_dir={tmp_path / 'run'}", "evaluate.source=sft") == 0


def test_controls_round_the_adapters_by_other_methods(
    tiny: Path, adapters: Path, upcast: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = linked(tmp_path / "run", upcast, "upcast")
    settings = (*FULL, *asked(run, tiny, adapters))
    assert run_program("stage=controls", *settings) == 0, capsys.readouterr().err
    assert {path.name for path in (run / "controls").iterdir() if path.is_dir()} == {"stochastic", "gptq"}
