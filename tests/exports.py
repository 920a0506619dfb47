"""Exports without a model: complete directories with artifact.json."""

import json
from pathlib import Path
from typing import Any

from pipeline.config import PipelineConfig, Stage
from pipeline.runs import artifacts
from pipeline.runs.artifacts import Artifact, Kind, Result

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
    """Make <run_dir>/export with these files."""

    def work(directory: Path) -> Result:
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
        details: dict[str, Any] = {"target": target, "exported_from": "qat", "exported_directory": "gone"}
        details |= {
            "moved_weights": moved,
            "changed_codes": 0.0,
            "survival": 0.0,
            "saturated_blocks": 0.0,
            "snr_db": None,
        }
        return Result(Kind.packed, "mxfp4", scale_rule="ceil", details=details)

    return artifacts.build(config, Stage.export, (), parents, work, is_report=True)


def prove(config: PipelineConfig, export: Artifact) -> Artifact:
    """Make the artifact of a passed `verify`."""
    parents = {"checkpoint": export.fingerprint, "reference": "s"}
    details = {"checks": {"scales: no NaN": "ok"}, "not_checked": []}
    return artifacts.build(
        config, Stage.verify, (), parents, lambda _: Result(Kind.report, details=details), is_report=True
    )
