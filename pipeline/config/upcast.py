"""Settings of `upcast`: the form that the experts have when training starts."""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Optional

from pipeline.config.bounds import POSITIVE
from pipeline.config.training import Method


class Experts(Enum):
    """Forms of the experts' weights during training."""

    packed = "packed"
    bf16 = "bf16"


@dataclass
class UpcastConfig:
    """Prepare the checkpoint that training starts from."""

    experts: Optional[Experts] = None
    """Form of the experts in training: packed (MXFP4, not for full training) or bf16; null: as the method needs."""
    shard_bytes: Annotated[int, POSITIVE] = 5_000_000_000
    """Largest size of one weight file, in bytes."""


def keeps_packed(asked: Experts | None, method: Method, *, is_mxfp4: bool) -> bool:
    """Return whether training starts from packed experts.

    Args:
        asked: value of upcast.experts. None means packed for bf16_parts, and for lora if the source is MXFP4.
        method: what the first training stage trains (see `first_training`).
        is_mxfp4: whether the experts of the source are MXFP4.
    """
    if asked is not None:
        return asked is Experts.packed
    return method is Method.bf16_parts or (method is Method.lora and is_mxfp4)
