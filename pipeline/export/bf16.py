"""Plain BF16: the values of the 4-bit format, unpacked, for whatever loads an ordinary checkpoint of transformers.

Every value of MXFP4 and of NVFP4 (under its tensor scale, a power of two) is exact in BF16. Four times the size.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints.gpt_oss import other_tensors
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import Piece, Written
from pipeline.export.exporter import Exporter
from pipeline.export.job import Job
from pipeline.export.layout import unpacked_layout
from pipeline.export.mxfp4 import legacy_config
from pipeline.export.weights import ExpertStack, Packed, checked_base, others_piece, stacks, write_checkpoint
from pipeline.runs.artifacts import Kind


def write(job: Job, directory: Path) -> Written:
    """Stream the model into `directory`, expert by expert.

    Raises:
        UserError: as exporting to `mxfp4`.
    """
    base = checked_base(job)
    pieces = [others_piece(job, base, name, [name]) for name in other_tensors(base.shape)]
    pieces += [_plain(stack) for stack in stacks(job, base)]
    return write_checkpoint(job, base, directory, pieces, described(base))


def described(base: Checkpoint, _: Collection[str] = ()) -> dict[str, Any]:
    """What config.json must say."""
    config = {key: value for key, value in legacy_config(base.config).items() if key != "quantization_config"}
    return {**config, "dtype": "bfloat16"}


def _plain(stack: ExpertStack) -> Piece:
    name = stack.projection.name

    def put(made: Packed) -> Iterator[tuple[str, Tensor]]:
        yield name, made.values.to(torch.bfloat16)

    def note() -> dict:
        return {**stack.note([name]), "is_copied": False}  # of an MXFP4 source no byte is the same

    return Piece({name: stack.projection.plain_tensor()}, lambda: stack.steps(put), note)


EXPORTER = Exporter(write=write, kind=Kind.checkpoint, layout=unpacked_layout, described=described)
