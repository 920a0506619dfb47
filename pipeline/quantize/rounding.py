"""Rounds a model's experts stack by stack, and writes the rounded model or only its account.

Training's forward pass and the export round weights again, by the format's scale rule. This must not change the rounded
weights.

- MXFP4: every rule keeps every value of the format. A block whose largest code is at most 3, 1.5 or 0.5 may get a
  scale that is smaller by a factor of 2, 4 or 8. Multiplied by this factor, its codes are again codes.
- NVFP4: `mse` tries the scales amax / 6 and amax / 4. One of them is the block's scale, or an eighth to a half of it,
  as above. Other rules would change a block whose largest code is 4. The smallest scales of e4m3 cannot be halved, and
  the tensor scale depends on the rounded weights. So some blocks with very small weights may change. Such a block is
  rounded again until its values stay. These blocks are counted.

Legend: E = experts, in = input dimension, out = output dimension.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoints.config_json import CONFIG, write_config
from pipeline.checkpoints.dtypes import stored_name
from pipeline.checkpoints.gpt_oss import ExpertProjection, TensorInfo, expert_projections, loaded_bytes, other_tensors
from pipeline.checkpoints.notes import Note
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import SHARD_BYTES, Part, Piece, Step, Written, sort_by_layer, write_sharded
from pipeline.checkpoints.side_files import copy_side_files
from pipeline.config import RoundingScales
from pipeline.export.account import Account, Scales
from pipeline.export.mxfp4 import released_config
from pipeline.export.weights import bad_block, blocks_then_scales, raise_if_not_divisible
from pipeline.models.saving import plain_piece
from pipeline.models.weights import Weights
from pipeline.numerics.codec import CodecError, fake_quantize
from pipeline.numerics.compiled import compilation_for
from pipeline.numerics.formats import MXFP4, BlockFormat
from pipeline.numerics.stochastic import Noise
from pipeline.quantize.codes import LayerCodes, StoredExperts
from pipeline.quantize.experts import RoundedExperts, own_scales, round_experts, scales_by_rule, settle
from pipeline.runs.console import progress
from pipeline.runs.json_files import write_json


@dataclass(frozen=True)
class Job:
    """A model to round, and how to round it.

    Attributes:
        weights: the trained weights.
        base: the checkpoint that training started from. The account compares with it.
        packed: the MXFP4 checkpoint whose scales are the base's own, or None.
        block_format: the format, with the scale rule of the forward pass and the export.
        rule: rule that chooses the scales, or None for the scales of `packed`.
        seed: seed of stochastic rounding, or None to round to the nearest value.
        device: device that computes, `cpu` or `cuda`.
        codes: experts that are rounded already, or None. Otherwise `rule` and `seed` say how to round.
    """

    weights: Weights
    base: Checkpoint
    packed: Checkpoint | None
    block_format: BlockFormat
    rule: str | None
    seed: int | None
    device: str
    codes: LayerCodes | None = None

    @property
    def projections(self) -> list[ExpertProjection]:
        """The stacks of experts of the model."""
        return expert_projections(self.weights.shape)

    @property
    def scales_name(self) -> str:
        """`base` or the rule that chooses the scales."""
        return self.rule or RoundingScales.base.name

    def scales_for(self, projection: ExpertProjection, trained: Tensor, own: Scales | None) -> Scales:
        """Return the scales to round to: those of the rule, or else the base's own. `trained` is (E, in, out)."""
        if self.rule is not None:
            return scales_by_rule(trained, self.block_format, self.rule, self.weights.importance(projection.name))
        assert own is not None
        return own

    def round(
        self,
        projection: ExpertProjection,
        rows: slice,
        trained: Tensor,
        own: Scales | None,
        stored: StoredExperts | None,
    ) -> RoundedExperts:
        """Round some experts, (E, in, out), or decode those that are rounded already.

        Args:
            projection: the stack.
            rows: the experts, as rows of the stack.
            trained: their weights.
            own: their scales in the base, or None.
            stored: the experts as `codes` has them, or None.
        """
        if stored is not None:
            return stored.decode(trained.dtype, self.device)
        noise = None if self.seed is None else Noise.of(self.seed, projection.name)
        return round_experts(trained, self.block_format, self.scales_for(projection, trained, own), noise, rows.start)

    def own_scales(self, packed: tuple[Tensor, ...] | None) -> Scales | None:
        """Return the base's own scales of the experts that were read from `packed`, or None if nothing is packed."""
        return None if packed is None else own_scales(packed, self.block_format, self.device)


@dataclass(frozen=True)
class _Read:
    """Some experts as they are stored: in the trained model, in the base, in the packed checkpoint, and rounded."""

    trained: tuple[Tensor, ...]
    base: tuple[Tensor, ...]
    packed: tuple[Tensor, ...] | None
    rounded: StoredExperts | None


@dataclass
class _Stack:
    """A stack of experts that is rounded.

    Attributes:
        account: sums over the experts rounded so far.
    """

    job: Job
    projection: ExpertProjection
    account: Account = field(default_factory=Account)

    def read(self, rows: slice) -> _Read:
        job, name = self.job, self.projection.name
        packed = None if job.packed is None else job.packed.read_stored(name, rows)
        rounded = None if job.codes is None else job.codes.read(self.projection, rows)
        return _Read(job.weights.read_stored(name, rows), job.base.read_stored(name, rows), packed, rounded)

    def round(self, rows: slice, read: _Read, *, is_final: bool) -> RoundedExperts:
        """Round some experts and add them to the account.

        Args:
            rows: the experts, as rows of the stack.
            read: the result of `read`.
            is_final: whether the rounded weights will be trained or exported. They are then rounded until the format's
                rule does not change them.
        """
        job, name = self.job, self.projection.name
        trained = job.weights.read_trained(name, rows, read.trained, job.device)
        base = job.base.decode_stored(
            name, tuple(each.to(job.device) for each in read.base), rows=rows, device=job.device
        )
        own = job.own_scales(read.packed)
        try:
            made = job.round(self.projection, rows, trained, own, read.rounded)
        except CodecError as error:
            where = job.weights.ref.directory
            raise bad_block(error, where, self.projection, rows, "Training went wrong.") from error
        values, adjusted = settle(made.values, job.block_format, name) if is_final else (made.values, 0)
        self._count(trained, values, base, scales=(made.scales, own), clipped=made.clipped, adjusted=adjusted)
        return RoundedExperts(made.blocks, made.scales, values, made.clipped)

    def _count(
        self,
        trained: Tensor,
        rounded: Tensor,
        base: Tensor,
        *,
        scales: tuple[Scales, Scales | None],
        clipped: int,
        adjusted: int,
    ) -> None:
        """Add some experts to the account. `scales` are those of the rounded weights, and the base's own if known."""
        job = self.job
        new, own = scales
        is_exact = own is not None and job.block_format.stores_like(MXFP4)
        turned = base.transpose(1, 2)
        near = base if is_exact else fake_quantize(turned, job.block_format).transpose(1, 2)
        old = own or scales_by_rule(base, job.block_format, job.block_format.scale_rule, None)
        self.account.add(
            trained,
            rounded,
            base=base,
            rounded_base=near,
            scales=(new, old),
            block_format=job.block_format,
            clipped=clipped,
            adjusted_blocks=adjusted,
        )

    def note(self) -> Note:
        """Return the record of the stack. `sums` is documented in `Account`."""
        return {"layer": self.projection.layer, "sums": self.account.sums}


def write_plain(job: Job, directory: Path) -> Written:
    """Write the model as a full checkpoint in the type of training. Adapters are merged, and experts are rounded."""
    dtype = job.weights.ref.dtype
    name = stored_name(dtype)

    def piece(stack: _Stack) -> Piece:
        projection = stack.projection
        info = projection.plain_tensor(name)
        return _piece(stack, {projection.name: info}, lambda made, _: [(projection.name, made.values.to(dtype))])

    written = _write(job, directory, piece, dtype)
    write_config(directory, job.weights.checkpoint.config, dtype)
    return written


def write_packed(job: Job, directory: Path) -> Written:
    """Write the model with packed experts, in the released layout. The format must be stored like MXFP4."""

    def piece(stack: _Stack) -> Piece:
        projection = stack.projection
        put = blocks_then_scales(projection.blocks, projection.scales)
        return _piece(
            stack, projection.packed_tensors(), lambda made, is_last: put(made.blocks, made.scales[0], is_last)
        )

    written = _write(job, directory, piece, torch.bfloat16)
    write_json(directory / CONFIG, released_config(job.weights.checkpoint.config))
    return written


def round_rows(job: Job, projection: ExpertProjection, rows: slice, trained: Tensor) -> Tensor:
    """Return some experts, (E, in, out), with the values that `write_plain` writes. `trained` are their weights."""
    packed = None if job.packed is None else job.packed.read_stored(projection.name, rows)
    stored = None if job.codes is None else job.codes.read(projection, rows)
    made = job.round(projection, rows, trained, job.own_scales(packed), stored)
    return settle(made.values, job.block_format, projection.name)[0]


def output_bytes(job: Job, *, is_packed: bool) -> int:
    """Return the size of the model that `write_packed` or `write_plain` writes."""
    return loaded_bytes(job.weights.shape, job.weights.ref.dtype.itemsize, stays_packed=is_packed)


def measure(job: Job) -> list[Note]:
    """Round the experts and write nothing. Return the record of each stack, like the notes of a written model."""
    notes = []
    with compilation_for(sum(each.values for each in job.projections)):
        for projection in progress(job.projections, what="rounding", unit="tensor"):
            stack = _Stack(job, projection)
            for rows in job.weights.parts(projection.name):
                stack.round(rows, stack.read(rows), is_final=False)
            notes.append(stack.note())
    return notes


def _write(job: Job, directory: Path, piece: Callable[[_Stack], Piece], dtype: torch.dtype) -> Written:
    for projection in job.projections:
        raise_if_not_divisible(projection, job.block_format)
    others = other_tensors(job.weights.shape, stored_name(dtype))
    pieces = [plain_piece(job.weights, name, info, dtype) for name, info in others.items()]
    pieces += [piece(_Stack(job, projection)) for projection in job.projections]
    with compilation_for(sum(each.values for each in job.projections)):
        written = write_sharded(directory, sort_by_layer(pieces), SHARD_BYTES, "quantize")
    copy_side_files(job.weights.ref.base, directory)
    return written


def _piece(
    stack: _Stack, tensors: dict[str, TensorInfo], put: Callable[[RoundedExperts, bool], Iterable[Part]]
) -> Piece:
    """Return the piece that rounds a stack. `put` takes some experts, and whether they are the last of the stack."""

    def step(rows: slice) -> Step:
        is_last = rows.stop == stack.projection.experts
        return Step(lambda: stack.read(rows), lambda read: put(stack.round(rows, read, is_final=True), is_last))

    def steps() -> Iterator[Step]:
        return (step(rows) for rows in stack.job.weights.parts(stack.projection.name))

    return Piece(tensors, steps, stack.note)
