"""export: any model of the run, or a directory, as a checkpoint for serving."""

from pathlib import Path

from pipeline import artifacts, models, source
from pipeline.artifacts import Artifact, Kind, Result
from pipeline.config import PipelineConfig, Stage
from pipeline.export import EXPORTERS
from pipeline.models import ModelRef, Weights
from pipeline.tracking import log_metrics

_SETTINGS = ("export",)
_SOURCES = (Stage.upcast, Stage.sft, Stage.quantize, Stage.qat)


def run(config: PipelineConfig) -> Artifact:
    """Make <run_dir>/export: names, shapes, types and configuration as the source checkpoint has them."""
    writer = EXPORTERS[config.export.target.name]
    ref = models.find(config, config.export.source, _SOURCES, "export.source")
    base = source.locate(config)

    def work(directory: Path) -> Result:
        details = writer(Weights(ref), base, directory, config.export.shard_bytes)
        log_metrics(directory, details)
        return Result(Kind.packed, config.export.target.name, details={**details, **_origin(ref)})

    parents = {"model": ref.fingerprint, "source": base.fingerprint}
    return artifacts.build(config, Stage.export, _SETTINGS, parents, work)


def _origin(ref: ModelRef) -> dict[str, str]:
    return {"exported_from": ref.name, "exported_directory": str(ref.directory)}
