"""What an exporter is given, and what it leaves."""

from dataclasses import dataclass

from pipeline.models import Weights
from pipeline.numerics.formats import BlockFormat
from pipeline.shards import Written
from pipeline.source import Source


@dataclass(frozen=True)
class Job:
    """An export to be made.

    Attributes:
        weights: of the model.
        source: the base checkpoint, whose layout, configuration and untouched bytes the export takes.
        block_format: of the experts, with the rule by which scales are chosen.
        shard_bytes: size limit of one weight file.
        device: where to compute, `cpu` or `cuda`.
    """

    weights: Weights
    source: Source
    block_format: BlockFormat
    shard_bytes: int
    device: str


@dataclass(frozen=True)
class Exported:
    """What an exporter wrote.

    Attributes:
        written: digests and sizes; each note has `tensors` (names), `is_copied` (whether they are the source's bytes),
            and for experts `layer`, `copied_experts` and `sums` of Survival.
    """

    written: Written
