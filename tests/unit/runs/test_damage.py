"""artifacts.check, and the version of artifact.json and of unfinished.json."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ArtifactCheck, PipelineConfig, Stage
from pipeline.errors import CheckFailed, UserError
from pipeline.runs.artifacts import ARTIFACT_VERSION, Artifact, Kind, Result, load
from pipeline.runs.building import build
from pipeline.runs.damage import find_damage
from pipeline.runs.json_files import seal, write_json
from pipeline.runs.records import StageRecord
from pipeline.runs.run import Run

FILES = {"model.safetensors": b"weights", "config.json": b"{}", "base/model.safetensors": b"experts"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base(StageRecord):
    """A record that names the checkpoint below adapters."""

    base: str | None


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    return PipelineConfig(stage=Stage.qat, recipe="smoke", run_dir=str(tmp_path / "run"))


def make(config: PipelineConfig, stage: Stage, base: str | None = None, error: Exception | None = None) -> Artifact:
    def work(directory: Path) -> Result:
        for name, content in FILES.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
        (directory / "metrics.jsonl").write_text('{"loss": 1.0}\n')
        if error is not None:
            raise error
        return Result(Kind.checkpoint, Base(base=base), format="bfloat16")

    return build(Run(config), stage, settings=("sft.seed",), parents={}, work=work)


def use(config: PipelineConfig, *needed: Stage) -> Artifact:
    """Build qat from other stages."""
    here = Run(config)
    for stage in needed:
        here.require(stage)
    result = Result(Kind.report, Base(base=None))
    return build(here, Stage.qat, settings=(), parents={}, work=lambda _: result)


def full(config: PipelineConfig) -> PipelineConfig:
    config.artifacts.check = ArtifactCheck.full
    return config


def flip(path: Path, at: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def edit_record(artifact: Artifact, change: Callable[[dict[str, Any]], None]) -> Path:
    path = artifact.directory / "artifact.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    write_json(path, seal({name: value for name, value in record.items() if name != "checksum"}))
    return path


@pytest.mark.parametrize("name", [*FILES, "metrics.jsonl", "config.yaml"])
def test_full_finds_a_flipped_bit_in_any_file_and_size_does_not(config: PipelineConfig, name: str) -> None:
    sft = make(config, Stage.sft)
    before = sft.digests[name]
    flip(sft.directory / name)
    use(config, Stage.sft)
    shutil.rmtree(Run(config).stage_dir(Stage.qat))
    with pytest.raises(CheckFailed) as caught:
        use(full(config), Stage.sft)
    message = str(caught.value)
    assert message.startswith(
        f"{sft.directory / name}: changed since stage=sft wrote it: its XXH3-128 was {before}, and"
    )
    assert "the disk or the memory is failing" in message
    assert message.endswith("Run stage=sft again with overwrite=true.")
    assert not Run(config).stage_dir(Stage.qat).exists()


def test_full_passes_sound_artifacts(config: PipelineConfig, capsys: pytest.CaptureFixture[str]) -> None:
    sft = make(config, Stage.sft)
    use(full(config), Stage.sft)
    assert f"every file has its recorded digest: {sft.directory}" in capsys.readouterr().out


def test_full_names_all_damaged_files_of_all_inputs(config: PipelineConfig) -> None:
    made = [make(config, stage) for stage in (Stage.upcast, Stage.sft)]
    for artifact in made:
        flip(artifact.directory / "model.safetensors")
        flip(artifact.directory / "config.json")
    with pytest.raises(CheckFailed, match=r"^4 problems:") as caught:
        use(full(config), Stage.upcast, Stage.sft)
    assert "may be a link to a file of its input" in str(caught.value)


@pytest.mark.parametrize("base", ["upcast", "upcast/base"])
def test_full_also_checks_the_checkpoint_below_adapters(config: PipelineConfig, base: str) -> None:
    upcast = make(config, Stage.upcast)
    make(config, Stage.sft, base)
    flip(upcast.directory / "base" / "model.safetensors")
    with pytest.raises(CheckFailed, match=r"upcast/base/model\.safetensors: changed since stage=upcast wrote it"):
        use(full(config), Stage.sft)


def test_full_reads_nothing_if_the_stage_is_up_to_date(config: PipelineConfig) -> None:
    sft = make(config, Stage.sft)
    made = use(config, Stage.sft)
    flip(sft.directory / "model.safetensors")
    assert use(full(config), Stage.sft) == made


def test_metrics_may_be_deleted(config: PipelineConfig) -> None:
    sft = make(config, Stage.sft)
    (sft.directory / "metrics.jsonl").unlink()
    use(full(config), Stage.sft)


def test_a_changed_artifact_json_is_found(config: PipelineConfig) -> None:
    sft = make(config, Stage.sft)
    path = sft.directory / "artifact.json"
    path.write_text(path.read_text().replace('"format": "bfloat16"', '"format": "bfloat17"'))
    assert find_damage(sft, stage="qat")[0].startswith(f"{path}: changed since stage=sft wrote it (checksum: ")


@pytest.mark.parametrize("bit", [0, 5, 6])
def test_a_flipped_bit_anywhere_in_artifact_json_is_found_or_changes_no_value(config: PipelineConfig, bit: int) -> None:
    sft = make(config, Stage.sft)
    path = sft.directory / "artifact.json"
    good = path.read_bytes()
    for at in range(0, len(good) - 1, 11):
        damaged = bytearray(good)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            assert find_damage(load(sft.directory), stage="qat") or load(sft.directory) == sft
        except UserError as error:
            assert str(sft.directory) in str(error)


def test_an_artifact_of_version_1_is_read_and_its_missing_digests_are_reported(
    config: PipelineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(record: dict[str, Any]) -> None:
        for name in ("version", "digests", "program"):
            del record[name]

    sft = make(config, Stage.sft)
    path = edit_record(sft, change)
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "checksum"}))
    assert load(sft.directory) == dataclasses.replace(sft, version=1, digests={})
    use(full(config), Stage.sft)
    assert f"{path}: an older version of this program wrote it, without digests" in capsys.readouterr().err


def test_an_artifact_of_a_newer_version_is_refused(config: PipelineConfig) -> None:
    sft = make(config, Stage.sft)
    path = edit_record(sft, lambda record: record.update(version=ARTIFACT_VERSION + 1, program="9.1"))
    with pytest.raises(UserError) as caught:
        use(config, Stage.sft)
    assert str(caught.value).startswith(
        f"{path}: made by a newer version 9.1 of this program. Its format has version 3"
    )
    assert "Upgrade the program" in str(caught.value)


@pytest.mark.parametrize("version", ["2", 0, None, 1.5])
def test_a_version_that_is_no_number_is_refused(config: PipelineConfig, version: Any) -> None:
    sft = make(config, Stage.sft)
    path = edit_record(sft, lambda record: record.update(version=version))
    with pytest.raises(UserError, match=rf"{path}: not a readable artifact \(version is "):
        load(sft.directory)


# --- unfinished.json ---------------------------------------------------------------------------------------------


def begin(config: PipelineConfig) -> Path:
    with pytest.raises(RuntimeError, match="cut"):
        make(config, Stage.sft, error=RuntimeError("cut"))
    return Run(config).stage_dir(Stage.sft) / "unfinished.json"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": {}}', '{"settings": {}, "parents": {}, "data": {"a": 1'])
def test_an_unreadable_unfinished_json_is_one_message_and_loses_nothing(config: PipelineConfig, text: str) -> None:
    path = begin(config)
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        make(config, Stage.sft)
    assert str(caught.value).startswith(f"{path}: not readable, so the unfinished work beside it cannot be resumed")
    assert (path.parent / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    config.overwrite = True
    make(config, Stage.sft)


def test_a_damaged_unfinished_json_is_found(config: PipelineConfig) -> None:
    path = begin(config)
    path.write_text(path.read_text().replace('"sft.seed": 42', '"sft.seed": 43'))
    with pytest.raises(UserError, match=r"cannot be resumed \(its checksum is"):
        make(config, Stage.sft)


def test_unfinished_work_of_a_newer_version_is_refused(config: PipelineConfig) -> None:
    path = begin(config)
    record = json.loads(path.read_text())
    del record["checksum"]
    write_json(path, seal({**record, "version": ARTIFACT_VERSION + 1}))
    with pytest.raises(UserError, match="made by a newer version of this program"):
        make(config, Stage.sft)


def test_unfinished_work_of_version_1_resumes(config: PipelineConfig, capsys: pytest.CaptureFixture[str]) -> None:
    path = begin(config)
    record = json.loads(path.read_text())
    write_json(path, {name: record[name] for name in ("settings", "parents", "data")})
    make(config, Stage.sft)
    assert "resuming what was interrupted" in capsys.readouterr().out
