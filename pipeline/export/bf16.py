"""Writes the 4-bit values as plain BF16, for software that loads ordinary transformers checkpoints.

BF16 represents every value of MXFP4 exactly. It also represents every value of this program's NVFP4 exactly, because
all tensor scales are powers of two. The export is four times as large as a 4-bit export.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoints.gpt_oss import other_tensors
from pipeline.checkpoints.notes import Note
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import Piece, Written
from pipeline.export.exporter import Exporter
from pipeline.export.job import Job
from pipeline.export.layout import unpacked_layout
from pipeline.export.mxfp4 import legacy_config
from pipeline.export.weights import ExpertStack, Packed, open_base, others_piece, stacks, write_checkpoint
from pipeline.runs.artifacts import Kind


def write(job: Job, directory: Path) -> Written:
    """Stream the model into `directory`, expert by expert.

    Raises:
        UserError: see `mxfp4.write`.
    """
    base = open_base(job)
    pieces = [others_piece(job, base, name, [name]) for name in other_tensors(base.shape)]
    pieces += [_stack_piece(stack) for stack in stacks(job, base)]
    return write_checkpoint(job, base, directory, pieces=pieces, config=describe(base))


def describe(base: Checkpoint, _: Collection[str] = ()) -> dict[str, object]:
    """Return the content of config.json."""
    config = {key: value for key, value in legacy_config(base.config).items() if key != "quantization_config"}
    return {**config, "dtype": "bfloat16"}


def _stack_piece(stack: ExpertStack) -> Piece:
    name = stack.projection.name

    def put(made: Packed) -> Iterator[tuple[str, Tensor]]:
        yield name, made.values.to(torch.bfloat16)

    def note() -> Note:
        return {**stack.note([name]), "is_copied": False}  # plain values are never the bytes of an MXFP4 source

    return Piece({name: stack.projection.plain_tensor()}, lambda: stack.steps(put), note)


EXPORTER = Exporter(write=write, kind=Kind.checkpoint, layout=unpacked_layout, describe=describe)
