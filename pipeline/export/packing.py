"""Packs the experts of a BF16 source whose weights are MXFP4 values, such as a decoded release.

A block is exact if it decodes to the bits of the source. The scale rule `ceil` finds an exact block whenever there is
one. It chooses the smallest scale at which the largest weight does not saturate. A released block can have a larger
scale, but then its codes are small. If its scale is larger by a factor of 2, 4 or 8, its codes are at most 3, 1.5 or
0.5. Each of these codes, multiplied by the factor, is again a code. So the smaller scale holds the same values. Zeros
keep their signs.

Legend: E = experts of one part, in and out = dimensions of the matrix, nb = blocks per row = in / 32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoints import soundness
from pipeline.checkpoints.config_json import CONFIG
from pipeline.checkpoints.gpt_oss import ExpertProjection, expert_projections, other_tensors
from pipeline.checkpoints.largest_codes import BlockCounts
from pipeline.checkpoints.notes import Note
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import INDEX, Part, Piece, Step, Written, sort_by_layer, write_sharded
from pipeline.errors import UserError
from pipeline.export.mxfp4 import released_config
from pipeline.export.weights import bad_block, blocks_then_scales, raise_if_not_divisible
from pipeline.models.saving import plain_piece
from pipeline.models.weights import Weights
from pipeline.numerics.codec import CodecError, decode, encode, same_bits
from pipeline.numerics.compiled import compilation_for
from pipeline.numerics.formats import MXFP4
from pipeline.runs.artifacts import SHARDS_FILE
from pipeline.runs.json_files import write_json


def pack(weights: Weights, directory: Path, *, shard_bytes: int, device: str) -> Written:
    """Write the released layout of a BF16 source: MXFP4 experts, copies of the other tensors, and config.json.

    Args:
        weights: the weights of the source.
        directory: directory to write.
        shard_bytes: size limit of one weight file, in bytes.
        device: device that packs.

    Raises:
        UserError: a tensor has another type than BF16, a weight is NaN or Inf, the block size does not divide an input
            dimension, or blocks are not exact. In the last case, the message gives the number of such blocks in the
            whole model, and the written weights are deleted.
    """
    raise_unless_bf16(weights.checkpoint)
    checkpoint, stacks = weights.checkpoint, expert_projections(weights.shape)
    for projection in stacks:
        raise_if_not_divisible(projection, MXFP4)
    others = other_tensors(weights.shape)
    plain = (plain_piece(weights, name, info, torch.bfloat16) for name, info in others.items())
    pieces = [soundness.add_checking(piece, checkpoint) for piece in plain]
    pieces += [_Stack(weights, projection, device).piece() for projection in stacks]
    with compilation_for(sum(projection.values for projection in stacks)):
        written = write_sharded(directory, sort_by_layer(pieces), shard_bytes, "upcast")
    _raise_if_not_exact(written, checkpoint.directory, directory)
    write_json(directory / CONFIG, released_config(checkpoint.config))
    return written


def raise_unless_bf16(checkpoint: Checkpoint) -> None:
    """Raise UserError if a plain source has tensors of another type than BF16."""
    others = sorted({info.dtype for info in checkpoint.tensors.values()} - {"BF16"})
    if others:
        raise UserError(f"{checkpoint.directory}: has {', '.join(others)} tensors; the source must be MXFP4 or BF16.")


@dataclass
class _Stack:
    """A stack of experts that is packed.

    Attributes:
        inexact: number of blocks, packed so far, that do not decode to the bits of the source.
        counts: counts of the blocks packed so far, by their largest code.
    """

    weights: Weights
    projection: ExpertProjection
    device: str
    inexact: int = 0
    counts: BlockCounts = field(default_factory=BlockCounts)

    def piece(self) -> Piece:
        """Return the piece that makes the blocks and scales.

        In the piece's note, `blocks` counts all blocks, and `inexact` counts the blocks that are not exact. The other
        entries come from `counts`.
        """
        return Piece(self.projection.packed_tensors(), self._steps, self._note)

    def _steps(self) -> Iterator[Step]:
        put = blocks_then_scales(self.projection.blocks, self.projection.scales)
        for rows in self.weights.parts(self.projection.name):
            yield self._step(rows, put)

    def _step(self, rows: slice, put: Callable[[Tensor, Tensor, bool], Iterator[Part]]) -> Step:
        def convert(stored: tuple[Tensor, ...]) -> Iterator[Part]:
            blocks, scales = self._pack(stored[0].to(self.device), rows)
            return put(blocks, scales, rows.stop == self.projection.experts)

        return Step(lambda: self.weights.read_stored(self.projection.name, rows), convert)

    def _pack(self, plain: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Encode (E, in, out) weights, and count the blocks that do not decode to the same bits."""
        try:
            blocks, scales = encode(plain.transpose(1, 2), MXFP4)
        except CodecError as error:
            soundness.scan(self.weights.checkpoint)  # names all tensors with NaN or Inf
            where = self.weights.ref.directory
            raise bad_block(error, where, self.projection, rows, "The checkpoint is damaged.") from error
        self.counts.add(blocks, scales)
        decoded = torch.empty_like(plain)
        decode(blocks, scales, plain.dtype, out=decoded.transpose(1, 2))
        if not same_bits(decoded, plain):
            self.inexact += _count_unlike(decoded, plain)
        return blocks, scales

    def _note(self) -> Note:
        rows = self.projection.packed_tensors()[self.projection.scales]
        return {"tensor": self.projection.name, "blocks": rows.bytes, "inexact": self.inexact, **self.counts.note()}


def _count_unlike(one: Tensor, other: Tensor) -> int:
    """Count the blocks whose bits differ between two BF16 tensors (E, in, out). The bits of 0 and -0 differ, too."""
    is_unlike = one.view(torch.int16) != other.view(torch.int16)
    return int(is_unlike.unflatten(1, (-1, MXFP4.block_size)).any(dim=2).sum())


def _raise_if_not_exact(written: Written, source: Path, directory: Path) -> None:
    """Raise UserError if blocks are not exact. Remove the weights first, so that no later run resumes with them."""
    wrong = [note for note in written.notes if note["inexact"]]
    if not wrong:
        return
    for name in (*written.files, INDEX, SHARDS_FILE):
        (directory / name).unlink(missing_ok=True)
    inexact, blocks = (sum(note[key] for note in written.notes) for key in ("inexact", "blocks"))
    raise UserError(
        f"upcast.experts=packed: {source} has weights that MXFP4 cannot hold exactly: {inexact:,} of {blocks:,} blocks,"
        f" in {len(wrong)} of {len(written.notes)} tensors. The first is {wrong[0]['tensor']}. Set upcast.experts=bf16"
        " to train on the weights as they are (not with bf16_parts). Or export the model first, which rounds it: run"
        " stage=upcast upcast.experts=bf16, then stage=export export.source=upcast, and give the export as model.path."
    )
