"""upcast: prepares the checkpoint that training starts from.

Adapters are trained on packed experts, so an MXFP4 source is linked. To train the experts themselves, they are decoded
to BF16, bit-exactly and shard by shard. A BF16 source is linked, or packed if the configuration asks for it.
"""

from pathlib import Path

from pipeline.checkpoints.side_files import copy_side_files
from pipeline.config import PipelineConfig, Stage, first_training, keeps_packed
from pipeline.data.tokenizers import load_tokenizer
from pipeline.models import source
from pipeline.models.references import ModelRef
from pipeline.models.source import Source
from pipeline.models.weights import Weights
from pipeline.runs.artifacts import Artifact, Result
from pipeline.runs.building import build
from pipeline.runs.records import UpcastRecord
from pipeline.runs.run import Run
from pipeline.runs.tracking import log_metrics
from pipeline.upcast import ways
from pipeline.upcast.work import Work

_SETTINGS = ("model.path", "model.revision", "model.tiny", "upcast")


def run(config: PipelineConfig) -> Artifact:
    """Make <run_dir>/upcast: the checkpoint that training starts from, with packed experts or in BF16."""
    here = Run(config)
    base = source.locate(here, config.model)
    load_tokenizer(base.directory)
    return build(
        here,
        Stage.upcast,
        settings=_SETTINGS,
        parents={"source": base.fingerprint},
        work=lambda directory: _upcast(base, directory, config),
    )


def _upcast(base: Source, directory: Path, config: PipelineConfig) -> Result:
    weights = Weights(ModelRef("source", base.directory, base.directory))
    is_packed = weights.checkpoint.is_packed
    _, first = first_training(config.quantize.source, config.sft, config.qat)
    stays_packed = keeps_packed(config.upcast.experts, first.method, is_mxfp4=is_packed)
    make = ways.choose(is_packed=is_packed, stays_packed=stays_packed)
    made = make(Work(weights, config.upcast.shard_bytes, config.device), directory)
    copy_side_files(base.directory, directory)
    figures = vars(made.figures)
    log_metrics(directory, figures)
    record = UpcastRecord(dtype="bfloat16", source=str(base.directory), **figures)
    return Result(made.kind, record, made.format, scale_rule=made.scale_rule, digests=made.digests)
