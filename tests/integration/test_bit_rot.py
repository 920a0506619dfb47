"""A flipped bit in any file of a finished run is found: by artifacts.check=full, by verify, or on resume."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ONE_LAYER, SHORT, linked, run_program
from safetensors.torch import load_file, save_file

from pipeline.config import ArtifactCheck, PipelineConfig
from pipeline.errors import CheckFailed, UserError
from pipeline.runs import damage
from pipeline.runs.artifacts import load

MODELS = ("upcast", "sft", "quantize", "qat", "export/mxfp4")
REPORTS = ("verify/mxfp4", "evaluate", "compare", "doctor")


@pytest.fixture(params=["smoke_run", "lora_run"])
def finished(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@contextmanager
def flipped(path: Path, at: float = 0.5) -> Iterator[None]:
    """Inside the block, the file is a copy with one flipped bit. Other names of the same file are left as they are."""
    good = path.read_bytes()
    damaged = bytearray(good)
    damaged[int((len(good) - 1) * at)] ^= 1
    path.unlink()
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(good)


def test_full_finds_a_flipped_bit_in_every_file_of_every_stage(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    checked = set()
    for name in (*MODELS, *REPORTS):
        directory = run / name
        damage.raise_if_damaged([load(directory)], "test")
        for path in sorted(each for each in directory.rglob("*") if each.is_file() and each.stat().st_size):
            # A name that changed in artifact.json is reported as a missing file of this name.
            place = path.parent if path.name == "artifact.json" else path
            for at in (0.0, 0.5, 1.0) if path == place else (0.3, 0.5):
                with flipped(path, at), pytest.raises((CheckFailed, UserError), match=re.escape(str(place))):
                    damage.raise_if_damaged([load(directory)], "test")
            checked.add(path.relative_to(run).as_posix())
    assert {"upcast/tokenizer.json", "qat/modelopt_state.pth", "export/mxfp4/config.json"} <= checked
    assert any(name.endswith("adapter_model.safetensors") for name in checked) == (
        finished.parent.name[:10] == "smoke_lora"
    )


@pytest.mark.parametrize(
    ("stage", "name", "needs"),
    [
        ("sft", "upcast/model.safetensors", ["upcast"]),
        ("quantize", "sft/tokenizer.json", ["upcast", "sft"]),
        ("qat", "quantize/modelopt_state.pth", ["upcast", "sft", "quantize"]),
        ("export", "qat/config.json", ["upcast", "sft", "quantize", "qat"]),
        ("evaluate", "qat/tokenizer_config.json", ["upcast", "sft", "quantize", "qat"]),
    ],
)
def test_with_full_a_stage_stops_before_it_works(
    stage: str, name: str, needs: list[str], smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = name.partition("/")[0]
    run = linked(tmp_path / "run", smoke_run, "source", *(each for each in needs if each != damaged))
    shutil.copytree(smoke_run / damaged, run / damaged)
    path = run / name if (run / name).is_file() else next((run / damaged).glob("*.safetensors"))
    arguments = (f"stage={stage}", "recipe=smoke", *SHORT, f"run_dir={run}", "artifacts.check=full")
    with flipped(path):
        assert run_program(*arguments) == 1
    error = capsys.readouterr().err
    assert f"{path}: changed since stage={damaged} wrote it: its XXH3-128 was" in error
    assert "Traceback" not in error and not (run / stage).exists()


@pytest.mark.parametrize("name", ["qat/model.safetensors", "qat/tokenizer.json", "export/mxfp4/model.safetensors"])
def test_verify_finds_a_flipped_bit_of_the_trained_model_and_of_the_export(
    name: str, smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(smoke_run, tmp_path / "run", symlinks=True))
    path = run / name if (run / name).is_file() else next((run / name).parent.glob("*.safetensors"))
    with flipped(path):
        assert run_program("stage=verify", "recipe=smoke", *SHORT, f"run_dir={run}", "overwrite=true") == 1
    # The export is read through the links in export/.
    assert f"{path.name}: changed since stage={name.partition('/')[0]} wrote it" in capsys.readouterr().err
    assert not (run / "verify" / "mxfp4" / "artifact.json").exists()


def test_a_bit_that_flips_before_the_export_is_not_proven(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export then equals the damaged model, so comparing weights finds nothing."""
    run = linked(tmp_path / "run", lora_run, "source", "upcast", "sft", "quantize")
    shutil.copytree(lora_run / "qat", run / "qat")
    arguments = ("recipe=smoke_lora", *SHORT, *ONE_LAYER, f"run_dir={run}")
    with flipped(run / "qat" / "adapter_model.safetensors", at=0.9):
        assert run_program("stage=export", *arguments) == 0
        assert run_program("stage=verify", *arguments) == 1
    report = json.loads((run / "verify" / "mxfp4" / "report.json").read_text(encoding="utf-8"))
    failed = [check["title"] for check in report["checks"] if check["status"] == "FAILED"]
    assert failed == ["trained model: its files are as its stage wrote them"]
    assert f"{run / 'qat' / 'adapter_model.safetensors'}: changed" in capsys.readouterr().err


@pytest.mark.parametrize("packed", [True, False], ids=["link", "decode"])
def test_nan_in_the_source_stops_upcast_and_doctor(
    packed: bool, smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(next((smoke_run / "source").iterdir()), tmp_path / "source"))
    shard = next(path for path in source.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    tensors = load_file(shard)
    tensors["model.norm.weight"][5:7] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    experts = "packed" if packed else "bf16"
    for stage in ("upcast", "doctor"):
        arguments = (f"run_dir={tmp_path / 'run'}", f"model.path={source}", f"upcast.experts={experts}")
        recipe = "smoke_lora" if packed else "smoke"
        assert run_program(f"stage={stage}", f"recipe={recipe}", *SHORT, *arguments) == 2
        error = capsys.readouterr().err
        assert f"{shard}: model.norm.weight: NaN at index [5], the first of 2 values that are NaN or Inf" in error
        assert "Traceback" not in error


def test_the_setting_is_size_by_default() -> None:
    assert PipelineConfig().artifacts.check is ArtifactCheck.size
