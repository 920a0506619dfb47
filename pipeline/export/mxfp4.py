"""The Hugging Face layout of openai/gpt-oss: MXFP4 experts, everything else BF16, config.json as the source has it.

What training did not touch keeps the source's own bytes: the same values can be written with other scales, and only the
bytes themselves are sure to be what every engine already serves.

Legend: E experts of one part, in, out dimensions of the matrix, nb = in / 32.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.artifacts import write_json
from pipeline.checkpoints import CONFIG, Checkpoint, copy_side_files
from pipeline.errors import UserError
from pipeline.export.survival import Survival
from pipeline.export.target import Job
from pipeline.gpt_oss import QUANTIZATION_CONFIG, ExpertProjection, TensorInfo, expert_projections, other_tensors
from pipeline.numerics.codec import CodecError, decode, encode
from pipeline.numerics.compiled import compilation_for
from pipeline.numerics.formats import MXFP4
from pipeline.shards import Piece, Step, Written, write_sharded

_DIALECT = ("rope_parameters", "dtype", "torch_dtype")
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def write(job: Job, directory: Path) -> Written:
    """Stream the model into `directory`, expert by expert.

    Raises:
        UserError: NaN or Inf in a weight, or an input dimension that 32 does not divide: names tensor, expert, block;
            a source of other sizes.
    """
    shape = job.weights.shape
    experts = expert_projections(shape)
    for projection in experts:
        _raise_if_not_divisible(projection)
    base = job.source.open()
    if shape != base.shape:
        raise UserError(
            f"{job.weights.ref.directory} has {shape}, but model.path={job.source.directory} has {base.shape}:"
            " the export takes its configuration from model.path, which must be the model that training started from."
        )
    pieces = [_Other(job, base, name, info).piece() for name, info in other_tensors(shape).items()]
    pieces += [_Experts(job, base, projection).piece() for projection in experts]
    pieces.sort(key=lambda piece: _order(next(iter(piece.tensors))))
    with compilation_for(sum(projection.values for projection in experts)):
        written = write_sharded(directory, pieces, job.shard_bytes, "export")
    copy_side_files(job.source.directory, directory)
    write_json(directory / CONFIG, released_config(base.config))
    return written


def released_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the export: the source's; a BF16 source's gets the quantization and the rope keys of the original.

    transformers 5 writes `rope_parameters`; the engines read `rope_scaling` and `rope_theta`.
    """
    if "quantization_config" in config:
        return config
    released = {key: value for key, value in config.items() if key not in _DIALECT}
    rope = config.get("rope_parameters")
    if rope:
        released["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        released["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 150000))
    return {**released, "quantization_config": QUANTIZATION_CONFIG}


@dataclass
class _Other:
    """A tensor that is not an expert weight, in BF16."""

    job: Job
    base: Checkpoint
    name: str
    info: TensorInfo
    is_copied: bool = True

    def piece(self) -> Piece:
        return Piece({self.name: self.info}, self._steps, self._note)

    def _steps(self) -> Iterable[Step]:
        return [self._step(rows) for rows in self.job.weights.parts(self.name)]

    def _step(self, rows: slice) -> Step:
        weights = self.job.weights
        return Step(
            lambda: (weights.stored(self.name, rows), self.base.read(self.name, rows)),
            lambda read: [(self.name, self._convert(rows, *read))],
        )

    def _convert(self, rows: slice, stored: tuple[Tensor, ...], source: Tensor) -> Tensor:
        tensor = self.job.weights.trained(self.name, rows, stored).to(torch.bfloat16)
        if not bool(tensor.isfinite().all()):
            first, *others = (~tensor.isfinite()).nonzero()[0].tolist()
            raise UserError(
                f"{self.job.weights.ref.directory}: {self.name}: NaN or Inf at index {[first + rows.start, *others]}."
                " Training went wrong."
            )
        self.is_copied &= source.dtype == tensor.dtype and _same_bits(tensor, source)
        return tensor

    def _note(self) -> dict[str, Any]:
        return {"tensors": [self.name], "is_copied": self.is_copied}


@dataclass
class _Experts:
    """A stack of expert weights as blocks and scales; experts that equal the source's keep the source's bytes."""

    job: Job
    base: Checkpoint
    projection: ExpertProjection
    scales: list[Tensor] = field(default_factory=list)
    survival: Survival = field(default_factory=Survival)
    copied_experts: int = 0

    def piece(self) -> Piece:
        return Piece(self.projection.packed_tensors(), self._steps, self._note)

    def _steps(self) -> Iterable[Step]:
        return [self._step(rows) for rows in self.job.weights.parts(self.projection.name)]

    def _step(self, rows: slice) -> Step:
        weights, name = self.job.weights, self.projection.name
        return Step(
            lambda: (weights.stored(name, rows), self.base.read_stored(name, rows)),
            lambda read: self._convert(rows, *read),
        )

    def _convert(
        self, rows: slice, stored: tuple[Tensor, ...], source: tuple[Tensor, ...]
    ) -> Iterable[tuple[str, Tensor]]:
        job, name = self.job, self.projection.name
        trained = job.weights.trained(name, rows, stored, job.device)  # (E, in, out)
        base = self.base.decoded(name, source, rows=rows, device=job.device)
        base_blocks, base_scales = (each.to(job.device) for each in self._packed(source, base))
        is_untouched = [len(source) == 2 and _same_bits(*pair) for pair in zip(trained, base, strict=True)]
        self.copied_experts += sum(is_untouched)
        if all(is_untouched):
            near, blocks, scales = base, base_blocks, base_scales
        else:
            near = torch.empty_like(trained)
            blocks, scales = self._encoded(trained, rows, near)
            untouched = torch.tensor(is_untouched).nonzero().flatten().to(job.device)
            blocks[untouched], scales[untouched] = base_blocks[untouched], base_scales[untouched]
        old = base if len(source) == 2 else _plain(base_blocks, base_scales, base)
        self.survival.add(trained, near, base, old, scales, base_scales, job.block_format)
        self.scales.append(scales)
        yield self.projection.blocks, blocks
        if rows.stop == self.projection.experts:
            yield self.projection.scales, torch.cat(self.scales)
            self.scales.clear()

    def _encoded(self, trained: Tensor, rows: slice, near: Tensor) -> tuple[Tensor, Tensor]:
        try:
            importance = self.job.weights.importance(self.projection.name)
            return encode(
                trained.transpose(1, 2),
                self.job.block_format,
                importance=None if importance is None else importance.to(trained.device),
                rounded=near.transpose(1, 2),
            )
        except CodecError as error:
            expert, row, block = error.block or (0, None, None)
            raise UserError(
                f"{self.job.weights.ref.directory}: {self.projection.name}: expert {expert + rows.start}, row {row},"
                f" block {block}: {error}. Training went wrong."
            ) from error

    def _packed(self, source: tuple[Tensor, ...], base: Tensor) -> tuple[Tensor, ...]:
        """The source's blocks and scales; of a BF16 source those that it would be exported to."""
        return source if len(source) == 2 else encode(base.transpose(1, 2), self.job.block_format)

    def _note(self) -> dict[str, Any]:
        return {
            "tensors": [self.projection.blocks, self.projection.scales],
            "is_copied": self.copied_experts == self.projection.experts,
            "layer": self.projection.layer,
            "copied_experts": self.copied_experts,
            "sums": self.survival.sums,
        }


def _plain(blocks: Tensor, scales: Tensor, like: Tensor) -> Tensor:
    """(E, in, out) in the type of `like`, which holds every value of the format."""
    plain = torch.empty_like(like)
    decode(blocks, scales, plain.dtype, out=plain.transpose(1, 2))
    return plain


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype:
        one, other = one.float(), other.float()
    return torch.equal(*(each.view(_BITS[each.dtype]) for each in (one, other)))


def _raise_if_not_divisible(projection: ExpertProjection) -> None:
    if projection.in_features % MXFP4.block_size:
        raise UserError(
            f"{projection.name}: expert 0, block {projection.in_features // MXFP4.block_size}: the input dimension"
            f" {projection.in_features} is not a multiple of {MXFP4.block_size}, the block size of {MXFP4.name}."
        )


def _order(name: str) -> tuple:
    """Layer by layer, in numeric order, so that a shard holds whole layers."""
    return tuple(int(part) if part.isdigit() else -1 for part in name.split(".")[:3]), name
