"""Two small stages that are built with a tracker: `upcast`, and `sft` which uses it. No model is loaded."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from pipeline.config import (
    ExportTarget,
    FormatConfig,
    ModelConfig,
    PipelineConfig,
    Stage,
    TrackingBackend,
    TrackingConfig,
    Upload,
)
from pipeline.runs.artifacts import Artifact, Kind, Result
from pipeline.runs.building import build
from pipeline.runs.records import StageRecord, TrainingRecord, UpcastRecord
from pipeline.runs.run import Run
from pipeline.runs.tracking import log_media, log_metrics, log_report, log_table

SECRET = "swordfish42"
DATA = "d" * 32
LOSSES = {0: 3.0, 2: 2.5, 4: 2.0}
KEPT_LOSS = 1.875


def configuration(directory: Path, backend: TrackingBackend, upload: Upload = Upload.report) -> PipelineConfig:
    """Return the configuration of a run in `directory`. A URL of the data set has a login."""
    config = PipelineConfig(stage=Stage.all, run_dir=str(directory), recipe="smoke", format=FormatConfig())
    config.model = ModelConfig(path="openai/gpt-oss-20b")
    config.data.path = f"https://me:{SECRET}@example.org/rows.jsonl"
    config.tracking = TrackingConfig(backend=backend, tags=["one"], upload=upload)
    return config


def build_stages(config: PipelineConfig) -> tuple[Artifact, Artifact]:
    """Build `upcast` and `sft`."""
    run = Run(config)
    upcast = build(run, Stage.upcast, settings=(), parents={"source": "b" * 32}, work=_upcast)
    parents = {"upcast": upcast.fingerprint}
    return upcast, build(run, Stage.sft, settings=("sft",), parents=parents, data=DATA, work=_sft)


def _upcast(directory: Path) -> Result:
    (directory / "model.safetensors").write_bytes(b"base")
    counts = {"decoded_tensors": 1, "packed_tensors": 0, "copied_tensors": 0, "tensor_bytes": 4}
    log_metrics(directory, counts)
    return Result(Kind.checkpoint, UpcastRecord(dtype="bfloat16", source="source", **counts), "bfloat16")


def _sft(directory: Path) -> Result:
    (directory / "model.safetensors").write_bytes(b"trained")
    (directory / "report.md").write_text("| a |")
    Figure(figsize=(1, 1)).savefig(directory / "loss.png")
    (directory / "page.html").write_text("<p>shown</p>")
    for step, loss in LOSSES.items():
        log_metrics(directory, {"step": step, "eval_loss": loss, "router_variation/layer_0": 0.5, "nothing": None})
    log_table(directory, "samples", ["prompt", "answer"], [["a|b", "c"], ["d", {"e": 1}]])
    log_media({"loss": directory / "loss.png"}, {"page": directory / "page.html"})
    log_report([directory / "report.md"])
    record = TrainingRecord(
        dtype="bfloat16",
        steps=4,
        kept_step=4,
        train_loss_first=3.5,
        train_loss_last=1.5,
        validation_loss_before=LOSSES[0],
        validation_loss=KEPT_LOSS,
    )
    return Result(Kind.checkpoint, record, "bfloat16")


FIGURES = {ExportTarget.mxfp4: 3, ExportTarget.gguf: 5}
"""Target -> a figure that its proof logs."""


def verify_targets(config: PipelineConfig) -> None:
    """Build an export and its proof for each of two targets."""
    for target, figure in FIGURES.items():
        config.export.target = target
        run = Run(config)
        made = build(run, Stage.export, settings=("export.target",), parents={}, work=_export, is_report=True)
        parents = {"checkpoint": made.fingerprint}
        build(run, Stage.verify, settings=(), parents=parents, work=_proof_with(figure), is_report=True)


def _export(directory: Path) -> Result:
    (directory / "model.safetensors").write_text(directory.name)
    return Result(Kind.foreign, StageRecord())


def _proof_with(figure: int) -> Callable[[Path], Result]:
    def work(directory: Path) -> Result:
        log_metrics(directory, {"tensors": figure})
        return Result(Kind.report, StageRecord())

    return work
