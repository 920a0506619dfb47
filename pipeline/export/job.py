"""Defines the input of an exporter."""

from dataclasses import dataclass

from pipeline.models.source import Source
from pipeline.models.weights import Weights
from pipeline.numerics.formats import BlockFormat


@dataclass(frozen=True)
class Job:
    """A model to export, and the settings of the export.

    Attributes:
        weights: the weights of the model.
        source: the base checkpoint. The export takes its configuration and layout from the base checkpoint, and
            copies the bytes of unchanged weights.
        block_format: number format of the expert weights, including the rule for scales.
        shard_bytes: size limit of one weight file, in bytes.
        device: device that computes, `cpu` or `cuda`.
    """

    weights: Weights
    source: Source
    block_format: BlockFormat
    shard_bytes: int
    device: str
