"""Checkpoints for serving: for each target a writer and how to read it back, one row in EXPORTERS."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.artifacts import Kind
from pipeline.checkpoints import Checkpoint, TensorFiles, read_config
from pipeline.errors import UserError
from pipeline.export import bf16, gguf, gguf_layout, mxfp4, nvfp4, openai
from pipeline.export.layout import Files, Layout, packed_layout, unpacked_layout
from pipeline.export.target import Job
from pipeline.gpt_oss import BLOCKS_SUFFIX, Shape, TensorInfo
from pipeline.shards import Written


@dataclass(frozen=True)
class Target:
    """A layout.

    Attributes:
        write: (job, directory) -> what was written.
        kind: of the directory.
        layout: which stored tensors hold which tensor of the plain layout.
        described: (base model, names of stored tensors) -> what `said` must be.
        mark: part of a tensor's name that no other layout has; None: what has none of the others'.
        open: the files of a directory.
        said: what a directory says of its model.
        optional: tensors that may be there besides, all or none.
        calibrated: (directory of a model with quantized inputs) -> what these must hold.
        records: files that the layout has besides the base model's.
        is_one_file: whether a single file holds everything, tokenizer and configuration too.
    """

    write: Callable[[Job, Path], Written]
    kind: Kind
    layout: Callable[[Shape], Layout]
    described: Callable[[Checkpoint, Collection[str]], dict[str, Any]]
    mark: str | None
    open: Callable[[Path], Files] = TensorFiles
    said: Callable[[Path], dict[str, Any]] = read_config
    optional: Callable[[Shape], dict[str, TensorInfo]] = lambda shape: {}
    calibrated: Callable[[Path], dict[str, Tensor]] = lambda model: {}
    records: tuple[str, ...] = ()
    is_one_file: bool = False


EXPORTERS = {
    "mxfp4": Target(mxfp4.write, Kind.packed, packed_layout, mxfp4.described, BLOCKS_SUFFIX),
    "openai": Target(openai.write, Kind.foreign, openai.layout, openai.described, "block."),
    "nvfp4": Target(
        nvfp4.write,
        Kind.foreign,
        nvfp4.layout,
        nvfp4.described,
        "_weight_scale",
        said=nvfp4.said,
        optional=nvfp4.input_scales,
        calibrated=nvfp4.calibrated,
        records=(nvfp4.RECORD,),
    ),
    "gguf": Target(
        gguf.write,
        Kind.foreign,
        gguf_layout.layout,
        gguf_layout.described,
        "blk.",
        open=gguf_layout.GgufFile,
        said=gguf_layout.said,
        is_one_file=True,
    ),
    "bf16": Target(bf16.write, Kind.checkpoint, unpacked_layout, bf16.described, None),
}
"""Layouts by name.

Each note of what `write` returns has `tensors` (names), `is_copied` (whether they are the source's own bytes), and, of
experts, `layer`, `copied_experts`, `other_than_trained` and `sums` of Survival.
"""


def recognized(directory: Path) -> str:
    """The layout of a directory that nobody has named, told from its tensors' names; mxfp4 if they cannot be read."""
    if any(directory.glob("*.gguf")) and not any(directory.glob("*.safetensors")):
        return "gguf"
    try:
        names = TensorFiles(directory).tensors
    except UserError:
        return "mxfp4"
    marked = (name for name, target in EXPORTERS.items() if target.mark and any(target.mark in each for each in names))
    return next(marked, "bf16")
