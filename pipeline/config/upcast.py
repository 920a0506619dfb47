"""`upcast`: MXFP4 -> BF16."""

from dataclasses import dataclass
from typing import Annotated

from pipeline.config.bounds import POSITIVE


@dataclass
class UpcastConfig:
    """Convert an MXFP4 checkpoint to BF16."""

    shard_bytes: Annotated[int, POSITIVE] = 5_000_000_000
    """Largest size of one weight file, in bytes."""
