"""upcast: prepares the checkpoint that training starts from.

Adapters are trained on packed experts, so the source is linked. To train the experts themselves, they are decoded to
BF16, bit-exactly and shard by shard. A BF16 source is linked.
"""

from pathlib import Path

import torch

from pipeline.checkpoints.config_json import CONFIG, write_config
from pipeline.checkpoints.gpt_oss import expert_projections, plain_tensors
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import write_sharded
from pipeline.checkpoints.side_files import copy_side_files, link_or_copy
from pipeline.config import Experts, PipelineConfig, Stage, keeps_packed
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import UserError
from pipeline.models import source
from pipeline.models.loading import device_of
from pipeline.models.references import ModelRef
from pipeline.models.saving import plain_piece
from pipeline.models.source import Source
from pipeline.models.weights import Weights
from pipeline.numerics.compiled import compilation_for
from pipeline.numerics.formats import MXFP4
from pipeline.runs.artifacts import Artifact, Kind, Result
from pipeline.runs.building import build
from pipeline.runs.console import say
from pipeline.runs.json_files import write_json
from pipeline.runs.records import UpcastRecord
from pipeline.runs.run import Run
from pipeline.runs.tracking import log_metrics

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
    checkpoint = base.open()
    stays_packed = _stays_packed(config, checkpoint)
    digests: dict[str, str] = {}
    if stays_packed:
        say("upcast", "adapters are trained on the packed experts: linking the source's files")
        figures = _link(checkpoint, directory)
    elif checkpoint.is_packed:
        figures, digests = _decode(base, directory, config)
    else:
        figures = _pass_through(checkpoint, directory)
    copy_side_files(base.directory, directory)
    if stays_packed:
        write_json(directory / CONFIG, checkpoint.config)
    else:
        write_config(directory, checkpoint.config, torch.bfloat16)
    log_metrics(directory, figures)
    record = UpcastRecord(
        dtype="bfloat16",
        source=str(base.directory),
        decoded_tensors=figures["decoded_tensors"],
        copied_tensors=figures["copied_tensors"],
        tensor_bytes=figures["tensor_bytes"],
    )
    kind, name = (Kind.packed, MXFP4.name) if stays_packed else (Kind.checkpoint, "bf16")
    return Result(kind, record, format=name, digests=digests)


def _stays_packed(config: PipelineConfig, checkpoint: Checkpoint) -> bool:
    """Return whether training starts from the packed experts.

    Raises:
        UserError: the configuration asks for packed experts, but the source has none.
    """
    asked = config.upcast.experts
    if asked is Experts.packed and not checkpoint.is_packed:
        raise UserError(
            f"upcast.experts=packed: the experts of {checkpoint.directory} are not packed, because the source is not"
            " MXFP4. Use an MXFP4 checkpoint as model.path, or set upcast.experts=bf16."
        )
    return keeps_packed(asked, config.sft.method, is_mxfp4=checkpoint.is_packed)


def _decode(base: Source, directory: Path, config: PipelineConfig) -> tuple[dict[str, int], dict[str, str]]:
    weights = Weights(ModelRef("source", base.directory, base.directory))
    layout, device = plain_tensors(weights.shape), device_of(config.device)
    pieces = [plain_piece(weights, name, info, torch.bfloat16, device) for name, info in layout.items()]
    with compilation_for(sum(projection.values for projection in expert_projections(weights.shape))):
        written = write_sharded(directory, pieces, config.upcast.shard_bytes, "upcast")
    decoded = sum(name not in weights.checkpoint.tensors for name in layout)
    figures = {"decoded_tensors": decoded, "copied_tensors": len(pieces) - decoded, "tensor_bytes": written.bytes}
    return figures, written.files


def _pass_through(checkpoint: Checkpoint, directory: Path) -> dict[str, int]:
    others = sorted({info.dtype for info in checkpoint.tensors.values()} - {"BF16"})
    if others:
        raise UserError(f"{checkpoint.directory}: has {', '.join(others)} tensors; the source must be MXFP4 or BF16.")
    say("upcast", "the source is BF16 already: linking its files")
    return _link(checkpoint, directory)


def _link(checkpoint: Checkpoint, directory: Path) -> dict[str, int]:
    for path in checkpoint.weight_files():
        link_or_copy(path, directory / path.name)
    return {
        "decoded_tensors": 0,
        "copied_tensors": len(checkpoint.tensors),
        "tensor_bytes": sum(info.bytes for info in checkpoint.tensors.values()),
    }
