"""Makes exports without running a model. Each export is a complete directory with artifact.json."""

import json
from pathlib import Path

from pipeline.config import PipelineConfig, Stage
from pipeline.runs.artifacts import Artifact, Kind, Result
from pipeline.runs.building import build
from pipeline.runs.records import ExportRecord, VerifyRecord
from pipeline.runs.run import Run

SIZES = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_local_experts": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 768,
}
EXPORTED = {"config.json": json.dumps(SIZES), "model.safetensors": "weights"}


def make_export(
    config: PipelineConfig,
    target: str = "mxfp4",
    files: dict[str, str] = EXPORTED,
    parents: dict[str, str] = {"model": "m", "source": "s"},  # noqa: B006 - never changed
    moved: float = 0.0,
) -> Artifact:
    """Make the artifact <run_dir>/export with these files."""

    def work(directory: Path) -> Result:
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
        return Result(Kind.packed, record_of(target, moved), format="mxfp4", scale_rule="ceil")

    return build(Run(config), Stage.export, settings=(), parents=parents, work=work, is_report=True)


def record_of(target: str, moved: float = 0.0) -> ExportRecord:
    """Make the record of an export. `moved` is the share of changed weights. No stored code or scale has changed."""
    return ExportRecord(
        target=target,
        exported_from="qat",
        exported_directory="gone",
        tensor_bytes=0,
        expert_weights=0,
        copied_tensors=0,
        encoded_tensors=0,
        copied_experts=0,
        copied=[],
        other_than_trained=0,
        relative_squared_error=0.0,
        snr_db=None,
        moved_weights=moved,
        changed_codes=0.0,
        changed_scales=0.0,
        survival=0.0,
        saturated_blocks=0.0,
    )


def prove(config: PipelineConfig, export: Artifact) -> Artifact:
    """Make the artifact of a passed `verify`."""
    parents = {"checkpoint": export.fingerprint, "reference": "s"}
    record = VerifyRecord(checks={"scales: no NaN": "ok"}, not_checked=[])
    return build(
        Run(config),
        Stage.verify,
        settings=(),
        parents=parents,
        work=lambda _: Result(Kind.report, record),
        is_report=True,
    )
