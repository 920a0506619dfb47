"""The ways to make the checkpoint that training starts from. The forms of the experts, before and after, choose one.

- MXFP4 stays packed: the files are linked. The scales are read, because training on a NaN would be noticed late.
- MXFP4 becomes BF16: the experts are decoded, bit-exactly and shard by shard.
- BF16 stays BF16: the files are linked.
- BF16 becomes MXFP4: see `packing`.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.checkpoints.config_json import CONFIG, write_config
from pipeline.checkpoints.gpt_oss import expert_projections, plain_tensors
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import write_sharded
from pipeline.checkpoints.side_files import link_or_copy
from pipeline.models.loading import device_of
from pipeline.models.saving import plain_piece
from pipeline.numerics.compiled import compilation_for
from pipeline.numerics.formats import MXFP4
from pipeline.runs.artifacts import Kind
from pipeline.runs.console import say
from pipeline.runs.json_files import write_json
from pipeline.upcast.packing import pack
from pipeline.upcast.work import Figures, Made, Work, raise_unless_bf16


def choose(*, is_packed: bool, stays_packed: bool) -> Callable[[Work, Path], Made]:
    """Return the function that makes the weights and config.json in a directory.

    Args:
        is_packed: whether the experts of the source are packed.
        stays_packed: whether training starts from packed experts.
    """
    return {
        (True, True): link_packed,
        (True, False): decode,
        (False, True): pack,
        (False, False): link_plain,
    }[is_packed, stays_packed]


def link_packed(work: Work, directory: Path) -> Made:
    """Link the files of an MXFP4 source.

    Raises:
        UserError: a scale byte is 255 (NaN).
    """
    checkpoint = work.weights.checkpoint
    for projection in expert_projections(checkpoint.shape):
        checkpoint.raise_if_nan(projection.name, checkpoint.read(projection.scales))
    say("upcast", "adapters are trained on the packed experts: linking the source's files")
    figures = _link(checkpoint, directory)
    write_json(directory / CONFIG, checkpoint.config)
    return Made(Kind.packed, MXFP4.name, figures)


def decode(work: Work, directory: Path) -> Made:
    """Decode the experts of an MXFP4 source to BF16.

    Raises:
        UserError: a scale byte is 255 (NaN), or the disk is full.
    """
    weights = work.weights
    layout, device = plain_tensors(weights.shape), device_of(work.device)
    pieces = [plain_piece(weights, name, info, torch.bfloat16, device) for name, info in layout.items()]
    with compilation_for(sum(projection.values for projection in expert_projections(weights.shape))):
        written = write_sharded(directory, pieces, work.shard_bytes, "upcast")
    write_config(directory, weights.checkpoint.config, torch.bfloat16)
    decoded = sum(name not in weights.checkpoint.tensors for name in layout)
    figures = Figures(decoded_tensors=decoded, copied_tensors=len(pieces) - decoded, tensor_bytes=written.bytes)
    return Made(Kind.checkpoint, "bf16", figures, written.files)


def link_plain(work: Work, directory: Path) -> Made:
    """Link the files of a BF16 source.

    Raises:
        UserError: a tensor has another type.
    """
    checkpoint = work.weights.checkpoint
    raise_unless_bf16(checkpoint)
    say("upcast", "the source is BF16 already: linking its files")
    figures = _link(checkpoint, directory)
    write_config(directory, checkpoint.config, torch.bfloat16)
    return Made(Kind.checkpoint, "bf16", figures)


def _link(checkpoint: Checkpoint, directory: Path) -> Figures:
    for path in checkpoint.weight_files():
        link_or_copy(path, directory / path.name)
    size = sum(info.bytes for info in checkpoint.tensors.values())
    return Figures(copied_tensors=len(checkpoint.tensors), tensor_bytes=size)
