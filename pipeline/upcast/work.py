"""Defines the input and the result of a way to make the checkpoint."""

from dataclasses import dataclass, field

from pipeline.checkpoints.reading import Checkpoint
from pipeline.config import Device
from pipeline.errors import UserError
from pipeline.models.weights import Weights
from pipeline.runs.artifacts import Kind


@dataclass(frozen=True)
class Work:
    """A source, and the settings of its conversion.

    Attributes:
        weights: the weights of the source.
        shard_bytes: size limit of one weight file, in bytes.
        device: setting of the device that converts. It is ignored if files are only linked.
    """

    weights: Weights
    shard_bytes: int
    device: Device


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Numbers of tensors that were decoded, packed and copied, and the bytes of all tensors in the checkpoint."""

    decoded_tensors: int = 0
    packed_tensors: int = 0
    copied_tensors: int
    tensor_bytes: int


@dataclass(frozen=True)
class Made:
    """The checkpoint that a way has made.

    Attributes:
        kind: kind of the checkpoint.
        format: format of the experts.
        figures: what was done to the tensors.
        digests: file -> XXH3-128 of its bytes, for files that were written and not linked.
        scale_rule: rule that chose the scales, or None if no scales were chosen.
    """

    kind: Kind
    format: str
    figures: Figures
    digests: dict[str, str] = field(default_factory=dict)
    scale_rule: str | None = None


def raise_unless_bf16(checkpoint: Checkpoint) -> None:
    """Raise UserError if a plain source has tensors of another type than BF16."""
    others = sorted({info.dtype for info in checkpoint.tensors.values()} - {"BF16"})
    if others:
        raise UserError(f"{checkpoint.directory}: has {', '.join(others)} tensors; the source must be MXFP4 or BF16.")
