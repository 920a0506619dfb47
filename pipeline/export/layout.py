"""The reader of exports. Each layout maps plain tensors to stored tensors, so that one proof serves all layouts.

Each target defines this map next to its writer. A tensor can be read in two ways:
- decoded by code from another project, for the proof that every bit is right;
- as codes and scales, for packed experts. This is faster, and enough to compare two checkpoints.

Legend: E experts of one part, in, out dimensions of the matrix, nb = blocks per row = in / block size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.checkpoints.gpt_oss import (
    ExpertProjection,
    Shape,
    TensorInfo,
    expert_projections,
    other_tensors,
    plain_tensors,
)
from pipeline.checkpoints.reading import Checkpoint
from pipeline.numerics.codec import decode

_STEP_VALUES = 1 << 24  # an expert of the released models has 16.6 million
_DECODED_ROWS = 1024


class Codes(NamedTuple):
    """4-bit weights in the codec's representation.

    Attributes:
        blocks: (E, out, nb, block size / 2) uint8, the even element in the low half of a byte.
        scales: (E, out, nb) uint8 (e8m0) or float8_e4m3fn.
        tensor_scale: (E) float32 for float8_e4m3fn scales, otherwise None.
    """

    blocks: Tensor
    scales: Tensor
    tensor_scale: Tensor | None = None


@dataclass(frozen=True)
class Held:
    """The stored tensors for one tensor of the plain layout, and how to decode them.

    Attributes:
        tensors: stored name -> type and shape. The first dimension matches the plain tensor's.
        decode: stored tensors of some rows -> values in a floating type. Experts become (E, out, in).
        codes: stored tensors of some experts -> codes and scales. None if they are not packed.
        first: first row of the plain tensor in the stored tensors.
    """

    tensors: dict[str, TensorInfo]
    decode: Callable[..., Tensor] = lambda stored: stored
    codes: Callable[..., Codes] | None = None
    first: int = 0


Layout = dict[str, Held]
"""Name in the plain layout -> its stored tensors."""


class Files(Protocol):
    """Stored tensors that can be read by name."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Read rows of the first dimension of a tensor, as stored."""


@dataclass(frozen=True)
class View:
    """The weights of a checkpoint of any layout, under their names in the plain layout.

    Attributes:
        files: the files with the weights.
        layout: the layout of the files.
        shape: sizes of the model.
        plain: name -> type and shape of each tensor in the plain layout.
    """

    files: Files
    layout: Layout
    shape: Shape
    plain: dict[str, TensorInfo] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plain", plain_tensors(self.shape))

    def parts(self, name: str) -> Iterator[slice]:
        """Split the first dimension of a tensor into slices that are small in memory."""
        count, *others = self.plain[name].shape
        rows = max(1, _STEP_VALUES // max(1, torch.Size(others).numel()))
        yield from (slice(start, min(start + rows, count)) for start in range(0, count, rows))

    def values(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Read rows of a tensor, decoded by code from another project. Experts are (E, out, in)."""
        return self.layout[name].decode(*self._stored(name, rows))

    def codes(self, name: str, rows: slice = slice(None)) -> Codes | None:
        """Read codes and scales of packed experts. Returns None for other tensors."""
        held = self.layout[name]
        return None if held.codes is None else held.codes(*self._stored(name, rows))

    def weights(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Read the same values as `values`, decoded by the fast codec. Experts are (E, in, out)."""
        codes = self.codes(name, rows)
        if codes is not None:
            return decode_codes(codes)
        values = self.values(name, rows)
        return values.transpose(1, 2) if len(self.plain[name].shape) == 3 else values

    def plain_values(self, name: str) -> Tensor:
        """Read a whole tensor as `values` does, in the order of the plain layout. Experts are (E, in, out)."""
        values = self.values(name)
        return values.transpose(1, 2) if len(self.plain[name].shape) == 3 else values

    def _stored(self, name: str, rows: slice) -> tuple[Tensor, ...]:
        held = self.layout[name]
        start, stop, _ = rows.indices(self.plain[name].shape[0])
        return tuple(self.files.read(stored, slice(held.first + start, held.first + stop)) for stored in held.tensors)


def decode_codes(codes: Codes) -> Tensor:
    """Decode with the codec to (E, in, out) bfloat16."""
    experts, out, nb, half = codes.blocks.shape
    plain = torch.empty((experts, 2 * nb * half, out), dtype=torch.bfloat16)
    decode(codes.blocks, codes.scales, torch.bfloat16, codes.tensor_scale, out=plain.transpose(1, 2))
    return plain


def restore_signed_zeros(values: Tensor, codes: Codes) -> Tensor:
    """Restore the signs of zeros in (E, out, in) values from a decoder that drops them."""
    return torch.where(values == 0, decode_codes(codes).transpose(1, 2).to(values.dtype), values)


def stored_tensors(layout: Layout) -> dict[str, TensorInfo]:
    """Return every stored tensor of a layout."""
    return {name: info for held in layout.values() for name, info in held.tensors.items()}


def others_layout(shape: Shape) -> Layout:
    """Return the layout of tensors without expert weights, stored under their own names."""
    return {name: Held({name: info}) for name, info in other_tensors(shape).items()}


def packed_stack(projection: ExpertProjection, blocks: str, scales: str) -> Held:
    """Return the layout of a stack of experts, stored as MXFP4 blocks and scales with these names."""
    infos = projection.packed_tensors().values()
    return Held(dict(zip((blocks, scales), infos, strict=True)), decode=_decode_by_transformers, codes=Codes)


def _decode_by_transformers(blocks: Tensor, scales: Tensor) -> Tensor:
    """Decode every value to (E, out, in) float32.

    A layer of gpt-oss-20b takes 26 CPU-seconds in steps of 1024 rows, and 30 in a single step.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    pieces = zip(blocks.split(_DECODED_ROWS, dim=1), scales.split(_DECODED_ROWS, dim=1), strict=True)
    columns = [convert_moe_packed_tensors(*piece, dtype=torch.float32) for piece in pieces]  # each (E, in, some of out)
    return torch.cat(columns, dim=2).transpose(1, 2)


def packed_layout(shape: Shape) -> Layout:
    """Return the layout of the released checkpoints."""
    stacks = {each.name: packed_stack(each, each.blocks, each.scales) for each in expert_projections(shape)}
    return others_layout(shape) | stacks


def unpacked_layout(shape: Shape) -> Layout:
    """Return the plain layout: experts are (E, in, out) in a floating type."""
    stacks = {
        each.name: Held({each.name: each.plain_tensor()}, decode=lambda plain: plain.transpose(1, 2))
        for each in expert_projections(shape)
    }
    return others_layout(shape) | stacks


def view_base(directory: Path) -> View:
    """Open the weights of a base model, packed or plain.

    Raises:
        UserError: the directory is not a gpt-oss checkpoint.
    """
    base = Checkpoint(directory)
    return View(base, packed_layout(base.shape) if base.is_packed else unpacked_layout(base.shape), base.shape)
