"""What an exporter is given."""

from dataclasses import dataclass

from pipeline.models.source import Source
from pipeline.models.weights import Weights
from pipeline.numerics.formats import BlockFormat


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
