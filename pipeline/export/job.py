"""The input of an exporter."""

from dataclasses import dataclass

from pipeline.models.source import Source
from pipeline.models.weights import Weights
from pipeline.numerics.formats import BlockFormat


@dataclass(frozen=True)
class Job:
    """A model to export, and how to export it.

    Attributes:
        weights: the weights of the model.
        source: the base checkpoint. The export takes its configuration, its layout, and its bytes of unchanged weights.
        block_format: format of the experts, with its scale rule.
        shard_bytes: size limit of one weight file, in bytes.
        device: device of the computation, `cpu` or `cuda`.
    """

    weights: Weights
    source: Source
    block_format: BlockFormat
    shard_bytes: int
    device: str
