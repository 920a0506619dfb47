"""Reads exports of every layout. A layout maps each plain tensor to its stored tensors, so one check serves all
layouts.

Each target defines its layout next to its writer. Tensors can be read in two ways:
- All tensors can be decoded by another project's code. A comparison of the decoded values verifies every bit.
- Packed experts can be read as codes and scales. This way is faster, and sufficient to compare two checkpoints.

Legend: E = number of experts in one part, `in` and `out` = sizes of a projection's inputs and outputs, nb = number of
blocks in a row (`in` divided by the block size).
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

_STEP_VALUES = 1 << 24  # number of values; the largest matrix of an expert in gpt-oss has 16.6 million values
_DECODED_ROWS = 1024


class Codes(NamedTuple):
    """4-bit weights in the codec's representation.

    Attributes:
        blocks: shape (E, out, nb, block size / 2), uint8. The low half of a byte holds the element with the even index.
        scales: shape (E, out, nb). The type is uint8 for e8m0 scales, otherwise float8_e4m3fn.
        tensor_scale: shape (E), float32. It is None unless the scales are float8_e4m3fn.
    """

    blocks: Tensor
    scales: Tensor
    tensor_scale: Tensor | None = None


@dataclass(frozen=True)
class Held:
    """The stored tensors for one tensor of the plain layout, and how to decode them.

    Attributes:
        tensors: stored name -> type and shape. The first dimension has the same meaning as in the plain tensor.
        decode: decodes some rows of the stored tensors to floating-point values. Experts become (E, out, in).
        codes: converts the stored tensors of some experts to codes and scales. None if the tensor is not packed.
        first: offset in the first dimension. Row i of the plain tensor is row `first + i` of the stored tensors.
    """

    tensors: dict[str, TensorInfo]
    decode: Callable[..., Tensor] = lambda stored: stored
    codes: Callable[..., Codes] | None = None
    first: int = 0


Layout = dict[str, Held]
"""Name of a tensor in the plain layout -> the stored tensors that hold it."""


class Files(Protocol):
    """The files of a checkpoint. Their stored tensors can be read by name."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Read a tensor as it is stored. `rows` is a slice of its first dimension."""


@dataclass(frozen=True)
class View:
    """Reads the weights of a checkpoint in any layout, by the names that the weights have in the plain layout.

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
        """Split the first dimension of a tensor into slices that need little memory."""
        count, *others = self.plain[name].shape
        rows = max(1, _STEP_VALUES // max(1, torch.Size(others).numel()))
        yield from (slice(start, min(start + rows, count)) for start in range(0, count, rows))

    def values(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Read rows of a tensor, decoded by another project's code. Experts are (E, out, in)."""
        return self.layout[name].decode(*self._stored(name, rows))

    def codes(self, name: str, rows: slice = slice(None)) -> Codes | None:
        """Read codes and scales of packed experts. Returns None for other tensors."""
        held = self.layout[name]
        return None if held.codes is None else held.codes(*self._stored(name, rows))

    def weights(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Read rows like `values`, but with this project's codec, which is faster. Experts are (E, in, out)."""
        codes = self.codes(name, rows)
        if codes is not None:
            return decode_codes(codes)
        values = self.values(name, rows)
        return values.transpose(1, 2) if len(self.plain[name].shape) == 3 else values

    def plain_values(self, name: str) -> Tensor:
        """Decode a whole tensor as `values` does, but return experts in the shape of the plain layout, (E, in, out)."""
        values = self.values(name)
        return values.transpose(1, 2) if len(self.plain[name].shape) == 3 else values

    def _stored(self, name: str, rows: slice) -> tuple[Tensor, ...]:
        held = self.layout[name]
        start, stop, _ = rows.indices(self.plain[name].shape[0])
        return tuple(self.files.read(stored, slice(held.first + start, held.first + stop)) for stored in held.tensors)


def decode_codes(codes: Codes) -> Tensor:
    """Decode experts to (E, in, out) bfloat16 with this project's codec."""
    experts, out, nb, half = codes.blocks.shape
    plain = torch.empty((experts, 2 * nb * half, out), dtype=torch.bfloat16)
    decode(codes.blocks, codes.scales, torch.bfloat16, codes.tensor_scale, out=plain.transpose(1, 2))
    return plain


def restore_signed_zeros(values: Tensor, codes: Codes) -> Tensor:
    """Restore the signs of zeros. `values` come from a decoder that drops these signs. Their shape is (E, out, in)."""
    return torch.where(values == 0, decode_codes(codes).transpose(1, 2).to(values.dtype), values)


def stored_tensors(layout: Layout) -> dict[str, TensorInfo]:
    """Return every stored tensor of a layout."""
    return {name: info for held in layout.values() for name, info in held.tensors.items()}


def others_layout(shape: Shape) -> Layout:
    """Return the layout of all tensors except expert weights.

    Each tensor is stored under its name in the plain layout.
    """
    return {name: Held({name: info}) for name, info in other_tensors(shape).items()}


def packed_stack(projection: ExpertProjection, blocks: str, scales: str) -> Held:
    """Return the layout of a stack of experts in MXFP4. `blocks` and `scales` are the names of its two tensors."""
    infos = projection.packed_tensors().values()
    return Held(dict(zip((blocks, scales), infos, strict=True)), decode=_decode_by_transformers, codes=Codes)


def _decode_by_transformers(blocks: Tensor, scales: Tensor) -> Tensor:
    """Decode blocks and scales to (E, out, in) float32.

    Decoding in steps of 1024 rows is faster: a layer of gpt-oss-20b takes 26 CPU-seconds in these steps, and 30
    CPU-seconds in a single step.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    pieces = zip(blocks.split(_DECODED_ROWS, dim=1), scales.split(_DECODED_ROWS, dim=1), strict=True)
    columns = [convert_moe_packed_tensors(*piece, dtype=torch.float32) for piece in pieces]  # each (E, in, up to 1024)
    return torch.cat(columns, dim=2).transpose(1, 2)


def packed_layout(shape: Shape) -> Layout:
    """Return the layout of the released checkpoints."""
    stacks = {each.name: packed_stack(each, each.blocks, each.scales) for each in expert_projections(shape)}
    return others_layout(shape) | stacks


def unpacked_layout(shape: Shape) -> Layout:
    """Return the plain layout. It holds experts in a floating-point type, with the shape (E, in, out)."""
    stacks = {
        each.name: Held({each.name: each.plain_tensor()}, decode=lambda plain: plain.transpose(1, 2))
        for each in expert_projections(shape)
    }
    return others_layout(shape) | stacks


def view_base(directory: Path) -> View:
    """Open the weights of a base model. Its layout may be packed or plain.

    Raises:
        UserError: the directory is not a gpt-oss checkpoint.
    """
    base = Checkpoint(directory)
    return View(base, packed_layout(base.shape) if base.is_packed else unpacked_layout(base.shape), base.shape)
