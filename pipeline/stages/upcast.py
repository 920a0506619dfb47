"""upcast: prepares the checkpoint that training starts from.

Adapters are trained on packed experts, so an MXFP4 source is linked. To train the experts themselves, they are decoded
to BF16, bit-exactly and shard by shard. A BF16 source is linked, or packed if the configuration asks for it.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from pipeline.checkpoints import largest_codes, soundness
from pipeline.checkpoints.config_json import CONFIG, write_config
from pipeline.checkpoints.gpt_oss import TensorInfo, expert_projections, plain_tensors
from pipeline.checkpoints.largest_codes import CodeFigures
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import Piece, write_sharded
from pipeline.checkpoints.side_files import copy_side_files, link_or_copy
from pipeline.config import PipelineConfig, Stage, first_training, keeps_packed
from pipeline.data.tokenizers import load_tokenizer
from pipeline.export.packing import pack, raise_unless_bf16
from pipeline.models import source
from pipeline.models.loading import device_of
from pipeline.models.references import ModelRef
from pipeline.models.saving import plain_piece
from pipeline.models.source import Source
from pipeline.models.weights import Weights
from pipeline.numerics.compiled import compilation_for
from pipeline.numerics.formats import MXFP4
from pipeline.numerics.scales import LARGEST_E2M1
from pipeline.runs.artifacts import Artifact, Kind, Result
from pipeline.runs.building import build
from pipeline.runs.console import say
from pipeline.runs.json_files import write_json
from pipeline.runs.records import UpcastRecord
from pipeline.runs.run import Run
from pipeline.runs.tracking import log_metrics

_SETTINGS = ("model.path", "model.revision", "model.tiny", "upcast")


@dataclass(frozen=True, kw_only=True)
class _Figures:
    """Figures of `UpcastRecord`."""

    decoded_tensors: int = 0
    packed_tensors: int = 0
    copied_tensors: int
    tensor_bytes: int
    largest_codes: CodeFigures | None = None


@dataclass(frozen=True)
class _Made:
    """A checkpoint.

    Attributes:
        kind: kind of the checkpoint.
        format: format of the experts.
        figures: what was done to the tensors.
        digests: weight file -> XXH3-128 of its bytes.
        scale_rule: rule that chose the scales, or None if no scales were chosen.
    """

    kind: Kind
    format: str
    figures: _Figures
    digests: dict[str, str] = field(default_factory=dict)
    scale_rule: str | None = None


def run(config: PipelineConfig) -> Artifact:
    """Make <run_dir>/upcast: the checkpoint that training starts from. Its experts are packed or in BF16."""
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
    if is_packed and stays_packed:
        made = _link_packed(weights.checkpoint, directory)
    elif is_packed:
        made = _decode(weights, directory, config)
    elif stays_packed:
        made = _pack(weights, directory, config)
    else:
        made = _link_plain(weights.checkpoint, directory)
    copy_side_files(base.directory, directory)
    figures = asdict(made.figures)
    log_metrics(directory, {name: value for name, value in figures.items() if value is not None})
    if (codes := made.figures.largest_codes) is not None:
        grows = f"with scale_rule=ceil, a block whose largest code is {LARGEST_E2M1:g} doubles its scale when this"
        say("upcast", f"{largest_codes.describe(codes)}; {grows} weight grows")
    record = UpcastRecord(dtype="bfloat16", source=str(base.directory), **figures)
    return Result(made.kind, record, made.format, scale_rule=made.scale_rule, digests=made.digests)


def _link_packed(checkpoint: Checkpoint, directory: Path) -> _Made:
    """Check the files of the MXFP4 source for NaN and Inf. Then link them."""
    digests = soundness.scan(checkpoint)
    say("upcast", "adapters are trained on the packed experts: linking the source's files")
    figures = replace(_link(checkpoint, directory), largest_codes=largest_codes.sample(checkpoint))
    write_json(directory / CONFIG, checkpoint.config)
    return _Made(Kind.packed, MXFP4.name, figures, digests)


def _decode(weights: Weights, directory: Path, config: PipelineConfig) -> _Made:
    """Decode the experts of an MXFP4 source to BF16."""
    layout, device = plain_tensors(weights.shape), device_of(config.device)
    stored = weights.checkpoint.tensors

    def piece(name: str, info: TensorInfo) -> Piece:
        found = plain_piece(weights, name, info, torch.bfloat16, device)
        return (
            soundness.add_checking(found, weights.checkpoint) if name in stored else largest_codes.add_counting(found)
        )

    pieces = [piece(name, info) for name, info in layout.items()]
    with compilation_for(sum(projection.values for projection in expert_projections(weights.shape))):
        written = write_sharded(directory, pieces, config.upcast.shard_bytes, "upcast")
    write_config(directory, weights.checkpoint.config, torch.bfloat16)
    decoded = sum(name not in stored for name in layout)
    figures = _Figures(
        decoded_tensors=decoded,
        copied_tensors=len(pieces) - decoded,
        tensor_bytes=written.bytes,
        largest_codes=largest_codes.total(written.notes),
    )
    return _Made(Kind.checkpoint, "bf16", figures, written.files)


def _pack(weights: Weights, directory: Path, config: PipelineConfig) -> _Made:
    """Pack the experts of a BF16 source whose weights are MXFP4 values."""
    say("upcast", "adapters are trained on packed experts: packing the source's experts as MXFP4")
    shard_bytes, device = config.upcast.shard_bytes, device_of(config.device)
    written = pack(weights, directory, shard_bytes=shard_bytes, device=device)
    packed = len(expert_projections(weights.shape))
    copied = len(weights.checkpoint.tensors) - packed
    codes = largest_codes.total(written.notes)
    figures = _Figures(packed_tensors=packed, copied_tensors=copied, tensor_bytes=written.bytes, largest_codes=codes)
    return _Made(Kind.packed, MXFP4.name, figures, written.files, MXFP4.scale_rule)


def _link_plain(checkpoint: Checkpoint, directory: Path) -> _Made:
    """Check the files of a BF16 source for NaN and Inf. Then link them."""
    raise_unless_bf16(checkpoint)
    digests = soundness.scan(checkpoint)
    say("upcast", "the source is BF16 already: linking its files")
    figures = _link(checkpoint, directory)
    write_config(directory, checkpoint.config, torch.bfloat16)
    return _Made(Kind.checkpoint, "bf16", figures, digests)


def _link(checkpoint: Checkpoint, directory: Path) -> _Figures:
    for path in checkpoint.weight_files():
        link_or_copy(path, directory / path.name)
    size = sum(info.bytes for info in checkpoint.tensors.values())
    return _Figures(copied_tensors=len(checkpoint.tensors), tensor_bytes=size)
