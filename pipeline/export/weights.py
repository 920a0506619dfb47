"""Converts weights for every target, part by part. The codec encodes expert weights. Other tensors become BF16.

Weights that training did not change keep the bytes of the source. The codec could represent the same values with other
scales, but only the original bytes are known to work in every engine.

Legend: E = number of experts in one part, `in` and `out` = sizes of a projection's inputs and outputs, nb = number of
blocks in a row (`in` divided by the block size).
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoints.config_json import CONFIG
from pipeline.checkpoints.gpt_oss import ExpertProjection, TensorInfo, expert_projections, other_tensors
from pipeline.checkpoints.notes import Note
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import Part, Piece, Step, Written, sort_by_layer, write_sharded
from pipeline.checkpoints.side_files import choose_side_files
from pipeline.errors import UserError
from pipeline.export.account import Account
from pipeline.export.job import Job
from pipeline.numerics.codec import CodecError, encode, fake_quantize, same_bits, tensor_scale
from pipeline.numerics.comparison import count_clipped, differences
from pipeline.numerics.compiled import compilation_for
from pipeline.numerics.formats import MXFP4, BlockFormat
from pipeline.numerics.scales import values_of
from pipeline.runs.json_files import write_json


@dataclass(frozen=True)
class Packed:
    """Encoded weights of some experts of a stack.

    Attributes:
        blocks: packed codes, shape (E, out, nb, block size / 2), uint8.
        scales: scales of the blocks, shape (E, out, nb). The format defines their type.
        tensor_scale: tensor scales of the experts, shape (E), float32. None if the format has no tensor scales.
        values: decoded values, shape (E, in, out).
        saturated: for each block, whether its scale is too small for its largest weight. The shape is (E, out, nb), and
            the type is bool.
        is_last: whether these are the last experts of the stack.
    """

    blocks: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    values: Tensor
    saturated: Tensor
    is_last: bool = False


def open_base(job: Job) -> Checkpoint:
    """Open the base checkpoint and check that the model fits the checkpoint's configuration.

    Raises:
        UserError: the sizes of the model and the base checkpoint differ, or the block size does not divide an input
            dimension.
    """
    base = job.source.open()
    if job.weights.shape != base.shape:
        raise UserError(
            f"{job.weights.ref.directory} has {job.weights.shape}, but model.path={job.source.directory} has"
            f" {base.shape}. The export takes its configuration from model.path. Set model.path to the model that"
            " training started from."
        )
    for projection in expert_projections(base.shape):
        raise_if_not_divisible(projection, job.block_format)
    return base


@dataclass
class OtherTensor:
    """A tensor other than expert weights. It is exported in BF16.

    Attributes:
        is_copied: whether all parts converted so far are identical to the source.
    """

    job: Job
    base: Checkpoint
    name: str
    is_copied: bool = True

    @property
    def info(self) -> TensorInfo:
        """Return the type and shape of the written tensor."""
        return other_tensors(self.base.shape)[self.name]

    def steps(self, put: Callable[[Tensor], Iterable[tuple[str, Tensor]]]) -> Iterator[Step]:
        """Yield the steps that make the tensor. `put` turns rows into pairs (name of the target's tensor, rows)."""
        for rows in self.job.weights.parts(self.name):
            yield self._step(rows, put)

    def _step(self, rows: slice, put: Callable[[Tensor], Iterable[tuple[str, Tensor]]]) -> Step:
        return Step(
            lambda: (self.job.weights.read_stored(self.name, rows), self.base.read(self.name, rows)),
            lambda read: put(self._convert(rows, *read)),
        )

    def _convert(self, rows: slice, stored: tuple[Tensor, ...], source: Tensor) -> Tensor:
        tensor = self.job.weights.read_trained(self.name, rows, stored).to(torch.bfloat16)
        if not bool(tensor.isfinite().all()):
            first, *others = (~tensor.isfinite()).nonzero()[0].tolist()
            raise UserError(
                f"{self.job.weights.ref.directory}: {self.name}: NaN or Inf at index {[first + rows.start, *others]}."
                " Training went wrong."
            )
        self.is_copied &= source.dtype == tensor.dtype and same_bits(tensor, source)
        return tensor


def others_piece(job: Job, base: Checkpoint, target: str, sources: Iterable[str]) -> Piece:
    """Return the piece for one tensor of the target. The tensor concatenates the rows of the source tensors."""
    parts = [OtherTensor(job, base, name) for name in sources]
    rows = sum(part.info.shape[0] for part in parts)
    info = TensorInfo(parts[0].info.dtype, (rows, *parts[0].info.shape[1:]))
    return Piece(
        {target: info},
        lambda: (step for part in parts for step in part.steps(lambda tensor: [(target, tensor)])),
        lambda: {"tensors": [target], "is_copied": all(part.is_copied for part in parts)},
    )


@dataclass
class ExpertStack:
    """A stack of expert weights, exported in the job's format.

    If the source has the same format, experts that training did not change keep the source's bytes.

    Attributes:
        account: sums over the experts converted so far.
        saturated_blocks: number of blocks, converted so far, whose scale is too small for their largest weight.
        copied_experts: number of experts converted so far that keep the source's bytes.
        other_than_trained: number of weights whose exported value differs from the rounded value that training used.
            The number stays 0 if training rounded to the same format or did not round.
    """

    job: Job
    base: Checkpoint
    projection: ExpertProjection
    account: Account = field(default_factory=Account)
    saturated_blocks: int = 0
    copied_experts: int = 0
    other_than_trained: int = 0

    def steps(self, put: Callable[[Packed], Iterable[tuple[str, Tensor]]]) -> Iterator[Step]:
        """Yield the steps that make the stack, a few experts at a time. `put` turns experts into (name, rows) pairs."""
        for rows in self.job.weights.parts(self.projection.name):
            yield self._step(rows, put)

    def note(self, tensors: list[str]) -> Note:
        """Return the note on the finished stack. `tensors` are the names of the written tensors."""
        return {
            "tensors": tensors,
            "is_copied": self.copied_experts == self.projection.experts,
            "layer": self.projection.layer,
            "copied_experts": self.copied_experts,
            "sums": self.account.sums,
            "saturated_blocks": self.saturated_blocks,
            "other_than_trained": self.other_than_trained,
        }

    def _step(self, rows: slice, put: Callable[[Packed], Iterable[tuple[str, Tensor]]]) -> Step:
        weights, name = self.job.weights, self.projection.name
        return Step(
            lambda: (weights.read_stored(name, rows), self.base.read_stored(name, rows)),
            lambda read: put(self._pack(rows, *read)),
        )

    def _pack(self, rows: slice, stored: tuple[Tensor, ...], source: tuple[Tensor, ...]) -> Packed:
        job, name = self.job, self.projection.name
        trained = job.weights.read_trained(name, rows, stored, job.device)  # (E, in, out)
        source = tuple(each.to(job.device) for each in source)
        base = self.base.decode_stored(name, source, rows=rows, device=job.device)
        old = self._pack_source(source, base)
        is_own = old.values is base
        is_untouched = [same_bits(*pair) for pair in zip(trained, base, strict=True)]
        self.copied_experts += sum(is_untouched) if is_own else 0
        new = old if all(is_untouched) else self._encode(trained, rows)
        if is_own and new is not old:
            _restore(new, old, torch.tensor(is_untouched).nonzero().flatten().to(job.device))
        self._count(trained, new, base, old)
        return replace(new, is_last=rows.stop == self.projection.experts)

    def _pack_source(self, source: tuple[Tensor, ...], base: Tensor) -> Packed:
        """Return the base model's experts in the job's format. If they are stored in another format, round them."""
        if len(source) == 1 or not self.job.block_format.stores_like(MXFP4):
            return self._round(base)
        blocks, scales = source
        return Packed(blocks, scales, None, base, torch.zeros_like(scales, dtype=torch.bool))

    def _encode(self, trained: Tensor, rows: slice) -> Packed:
        try:
            return self._round(trained)
        except CodecError as error:
            where = self.job.weights.ref.directory
            raise bad_block(error, where, self.projection, rows, "Training went wrong.") from error

    def _round(self, values: Tensor) -> Packed:
        importance = self.job.weights.importance(self.projection.name)
        importance = None if importance is None else importance.to(values.device)
        block_format, near, turned = self.job.block_format, torch.empty_like(values), values.transpose(1, 2)
        unit = tensor_scale(turned, block_format)
        blocks_in_row = turned.shape[2] // block_format.block_size
        saturated = torch.empty((*turned.shape[:2], blocks_in_row), dtype=torch.bool, device=values.device)
        blocks, scales = encode(
            turned, block_format, unit, importance, rounded=near.transpose(1, 2), saturated=saturated
        )
        return Packed(blocks, scales, unit, near, saturated)

    def _count(self, trained: Tensor, new: Packed, base: Tensor, old: Packed) -> None:
        job = self.job
        if new.values is base:
            self.account.add_untouched(trained, new.scales.numel())
        else:
            saturated = int(new.saturated.sum())
            self.saturated_blocks += saturated
            self.account.add(
                trained,
                new.values,
                base=base,
                rounded_base=old.values,
                scales=((new.scales, new.tensor_scale), (old.scales, old.tensor_scale)),
                block_format=job.block_format,
                clipped=_count_clipped(trained, new, job.block_format) if saturated else 0,
            )
        trained_for = job.weights.ref.block_format
        if trained_for not in (None, job.block_format):
            importance = job.weights.importance(self.projection.name)
            seen = fake_quantize(trained.transpose(1, 2), trained_for, importance=importance).transpose(1, 2)
            _, _, changed, _ = differences((new.values, new.values, seen, seen)).tolist()
            self.other_than_trained += int(changed)


def stacks(job: Job, base: Checkpoint) -> list[ExpertStack]:
    """Return one ExpertStack for each stack of expert weights in the model."""
    return [ExpertStack(job, base, projection) for projection in expert_projections(base.shape)]


def write_checkpoint(
    job: Job, base: Checkpoint, directory: Path, *, pieces: list[Piece], config: Mapping[str, object]
) -> Written:
    """Write the pieces layer by layer, then copy the side files of the model and its source, then write config.json."""
    values = sum(projection.values for projection in expert_projections(base.shape))
    with compilation_for(values):
        written = write_sharded(directory, sort_by_layer(pieces), job.shard_bytes, "export")
    for name, file in choose_side_files(job.source.directory, job.weights.ref.directory).items():
        shutil.copyfile(file, directory / name)
    write_json(directory / CONFIG, config)
    return written


def packed_piece(stack: ExpertStack, blocks: str, scales: str) -> Piece:
    """Return the piece that stores a stack as two tensors. Their names are `blocks` and `scales`."""
    put = blocks_then_scales(blocks, scales)
    tensors = dict(zip((blocks, scales), stack.projection.packed_tensors().values(), strict=True))
    return Piece(
        tensors,
        lambda: stack.steps(lambda made: put(made.blocks, made.scales, made.is_last)),
        lambda: stack.note([blocks, scales]),
    )


def blocks_then_scales(blocks: str, scales: str) -> Callable[[Tensor, Tensor, bool], Iterator[Part]]:
    """Return a function that yields parts of two tensors, the blocks and the scales of a stack.

    The function takes the blocks and scales of some experts, and whether these are the last experts of the stack. A
    tensor must be complete before the next one begins. So the function keeps all scales, and yields them at the end.
    """
    held: list[Tensor] = []

    def put(made_blocks: Tensor, made_scales: Tensor, is_last: bool) -> Iterator[Part]:
        yield blocks, made_blocks
        held.append(made_scales)
        if is_last:
            yield scales, torch.cat(held)
            held.clear()

    return put


def _count_clipped(trained: Tensor, new: Packed, block_format: BlockFormat) -> int:
    return int(count_clipped(trained, values_of(new.scales, new.tensor_scale), block_format))


def _restore(new: Packed, old: Packed, experts: Tensor) -> None:
    """Overwrite the given experts with the source's bytes. Their values stay the same, but scales may change."""
    for mine, source in ((new.blocks, old.blocks), (new.scales, old.scales), (new.saturated, old.saturated)):
        mine[experts] = source[experts]


def bad_block(error: CodecError, directory: Path, projection: ExpertProjection, rows: slice, reason: str) -> UserError:
    """Return the error for the user that names the bad block of a stack.

    Args:
        error: error of the codec for some experts of the stack.
        directory: directory of the model.
        projection: the stack.
        rows: the experts, as rows of the stack.
        reason: last sentence of the message.
    """
    expert, row, block = error.block or (0, None, None)
    place = f"{directory}: {projection.name}: expert {expert + rows.start}, row {row}, block {block}"
    return UserError(f"{place}: {error}. {reason}")


def raise_if_not_divisible(projection: ExpertProjection, block_format: BlockFormat) -> None:
    """Raise UserError if the input dimension of a stack of experts is not a multiple of the block size."""
    size = block_format.block_size
    if projection.in_features % size:
        raise UserError(
            f"{projection.name}: expert 0, block {projection.in_features // size} is incomplete: the input dimension"
            f" {projection.in_features} is not a multiple of {size}, the block size of {block_format.name}."
        )
