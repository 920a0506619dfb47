"""The real wandb package, offline: its file has the figures, the lineage and the final figures, and no secrets."""

import glob
import json
import os
import shlex
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT, run_program
from matplotlib.figure import Figure
from tracked_stages import FIGURES, SECRET, build_stages, configuration, verify_targets

from pipeline.config import PipelineConfig, TrackingBackend, TrackingConfig, Upload
from pipeline.runs.artifacts import load
from pipeline.runs.metrics import read_metrics
from pipeline.runs.records import TrainingRecord
from pipeline.runs.run import Run
from pipeline.runs.tracking import log_media, log_metrics, log_table, one_hint, track

SECRETS = {"WANDB_API_KEY": "0123456789abcdef" * 3, "HF_TOKEN": "hf_aTokenThatNobodyHas", "MY_PASSWORD": "swordfish42"}
HEADER_BYTES, BLOCK_BYTES = 7, 32768


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set up an environment with secrets, an empty home and an empty current directory."""
    import wandb

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name, value in {**SECRETS, "WANDB_MODE": "offline", "HOME": str(tmp_path_factory.mktemp("home"))}.items():
            patch.setenv(name, value)
        patch.chdir(tmp_path_factory.mktemp("current"))
        wandb.teardown()  # ends the service, which has the environment of an earlier test
        yield
        wandb.teardown()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run up to SFT. SFT was run twice."""
    run_dir = tmp_path_factory.mktemp("tracked") / "run"
    arguments = ("recipe=smoke", "tracking=wandb", "tracking.tags=[one]", f"run_dir={run_dir}", *SHORT)
    for stage in ("upcast", "sft"):
        assert run_program(f"stage={stage}", *arguments) == 0
    assert run_program("stage=sft", *arguments, "sft.max_steps=2", "overwrite=true") == 0
    return run_dir


def records(path: Path) -> list[Any]:
    """Read the protobuf messages of a .wandb file. The file has LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, found = path.read_bytes(), HEADER_BYTES, b"", []
    assert data.startswith(b":W&B")
    while at + HEADER_BYTES <= len(data):
        room = BLOCK_BYTES - at % BLOCK_BYTES
        if room < HEADER_BYTES:  # padding, because the header of a fragment does not fit
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER_BYTES])
        parts += data[at + HEADER_BYTES : at + HEADER_BYTES + length]
        at += HEADER_BYTES + length
        if kind in (1, 4):  # a whole message, or its last fragment
            found.append(Record.FromString(parts))
            parts = b""
    return found


def wandb_files(run_dir: Path, stage: str) -> list[Path]:
    """List the files of a stage's runs, oldest first.

    `finish` can return while wandb's own process still writes. The teardown waits until the files are complete.
    """
    import wandb

    wandb.teardown()
    return sorted(run_dir.glob(f"wandb/offline-run-*-{stage}/*.wandb"), key=lambda path: path.stat().st_mtime)


def history(found: list[Any]) -> list[dict[str, Any]]:
    """List the logged lines without the fields that wandb adds."""
    lines = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            lines.append({key: value for key, value in items.items() if not key.startswith("_")})
    return lines


def run_record(found: list[Any]) -> Any:
    return next(record.run for record in found if record.WhichOneof("record_type") == "run")


def key_of(name: str) -> str:
    return name if name == "step" else f"sft/{name}"


def artifacts(found: list[Any]) -> list[Any]:
    return [record.artifact for record in found if record.WhichOneof("record_type") == "artifact"]


def test_the_file_holds_every_line_of_metrics_jsonl(run_dir: Path) -> None:
    logged = read_metrics(run_dir / "sft")
    assert [line["step"] for line in logged] == [0, 2, 2]
    expected = [{key_of(name): value for name, value in line.items() if name != "time"} for line in logged]
    assert history(records(wandb_files(run_dir, "sft")[-1])) == expected
    names = {name for line in logged for name in line}
    assert {"loss", "eval_loss", "eval_perplexity", "learning_rate", "grad_norm", "tokens_per_second", "epoch"} <= names
    assert {"supervised_tokens", "peak_memory_bytes", "seconds", "router_variation/layer_1"} <= names


def test_a_repeated_stage_is_the_same_run_in_the_group_of_the_pipeline(run_dir: Path) -> None:
    first, second, upcast = (
        run_record(records(path)) for path in (*wandb_files(run_dir, "sft"), *wandb_files(run_dir, "upcast"))
    )
    assert first.run_id == second.run_id != upcast.run_id
    assert first.run_group == second.run_group == upcast.run_group
    assert (first.job_type, first.display_name, first.project, list(first.tags)) == (
        "sft",
        "smoke-sft",
        "gpt-oss-qat",
        ["one", "smoke", "tiny", "mxfp4"],
    )


def test_a_model_is_the_same_artifact_where_it_is_made_and_where_it_is_used(run_dir: Path) -> None:
    (made,) = [each for each in artifacts(records(wandb_files(run_dir, "upcast")[0])) if each.name == "smoke-upcast"]
    inputs = {each.name: each for each in artifacts(records(wandb_files(run_dir, "sft")[-1])) if each.use_after_commit}
    assert sorted(inputs) == ["data-arithmetic", "smoke-upcast"]
    fingerprint = load(run_dir / "upcast").fingerprint
    assert (inputs["smoke-upcast"].digest, inputs["smoke-upcast"].type) == (made.digest, "model")
    assert {*inputs["smoke-upcast"].aliases} == {*made.aliases} == {"latest", fingerprint[:12]}
    assert not made.use_after_commit
    assert [entry.path for entry in made.manifest.contents] == ["description.json"]


def test_the_summary_has_the_final_figures_of_the_model(run_dir: Path) -> None:
    found = records(wandb_files(run_dir, "sft")[-1])
    items = [
        item for record in found if record.WhichOneof("record_type") == "summary" for item in record.summary.update
    ]
    summary = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
    record = load(run_dir / "sft").read(TrainingRecord)
    assert summary["sft/validation_loss"] == record.validation_loss
    assert summary["sft/kept_step"] == record.kept_step


def test_the_command_that_uploads_all_stages_is_printed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "a run"
    with one_hint("all"):
        build_stages(configuration(run_dir, TrackingBackend.wandb, Upload.models))
    line = f"[all] to upload the offline runs to W&B: wandb sync '{run_dir}/wandb'/offline-run-*"
    assert [each for each in capsys.readouterr().out.splitlines() if "wandb" in each] == [line]
    command = shlex.split(line.partition(": ")[2].replace("wandb sync", "ls -d"))
    assert sorted(path.rpartition("-")[2] for path in glob.glob(command[-1])) == ["sft", "upcast"]
    (files,) = [each for each in artifacts(records(wandb_files(run_dir, "sft")[0])) if each.type == "model-files"]
    assert "model.safetensors" in [entry.path for entry in files.manifest.contents]
    assert not [
        path for path in run_dir.glob("wandb/**/*.*") if path.is_file() and SECRET.encode() in path.read_bytes()
    ]


def test_the_configuration_is_there_and_no_secret_is_anywhere(run_dir: Path) -> None:
    config = {
        item.key: json.loads(item.value_json)
        for item in run_record(records(wandb_files(run_dir, "sft")[0])).config.update
    }
    assert config["sft"]["learning_rate"] == 0.003
    assert config["model"]["path"] == "synthetic://tiny"
    for path in run_dir.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [name for name, value in SECRETS.items() if value.encode() in content], path


def test_wandb_writes_nothing_but_in_the_run(run_dir: Path) -> None:
    assert list(Path.cwd().iterdir()) == []
    assert not [path for path in Path.home().rglob("*") if path.is_file()]


def test_tables_plots_and_pages_are_in_the_file_and_on_disk(tmp_path: Path) -> None:
    config = PipelineConfig(tracking=TrackingConfig(backend=TrackingBackend.wandb), recipe="smoke")
    page, plot = tmp_path / "compare.html", tmp_path / "loss.png"
    page.write_text("<!doctype html><p>shown</p>")
    Figure().savefig(plot)
    with track(Run(config), "compare", tmp_path):
        log_metrics(tmp_path, {"model": "sft", "loss": 1.0, "loss_change": None})
        log_table(tmp_path, "examples", ["prompt", "answer"], [["a", "b"], ["c", {"d": 1}]])
        log_media({"loss": plot}, {"compare": page})
    (file,) = wandb_files(tmp_path, "compare")
    found = records(file)
    assert history(found)[0] == {"sft/loss": 1.0}
    assert history(found)[1]["examples.nrows"] == 2
    media = {path.name.split("_")[0]: path for path in file.parent.glob("files/media/*/*/*")}
    assert media["loss"].read_bytes() == plot.read_bytes()
    assert media["compare"].read_text() == page.read_text()
    (table,) = file.parent.glob("files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [["a", "b"], ["c", {"d": 1}]]
    assert len((tmp_path / "examples.jsonl").read_text().splitlines()) == 2


def test_the_proofs_of_two_exports_are_two_runs(tmp_path: Path) -> None:
    verify_targets(configuration(tmp_path, TrackingBackend.wandb))
    ids = set()
    for target, figure in FIGURES.items():
        (path,) = wandb_files(tmp_path, f"verify-{target.name}")
        found = records(path)
        assert run_record(found).display_name == f"smoke-verify-{target.name}"
        assert history(found) == [{"verify/tensors": figure}]
        assert f"smoke-export-{target.name}" in {each.name for each in artifacts(found)}
        ids.add(run_record(found).run_id)
    assert len(ids) == len(FIGURES)
