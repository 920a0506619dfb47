"""Finds the checkpoints that rounding refers to: the base before training, and its own scales."""

from pathlib import Path

from pipeline.checkpoints.reading import Checkpoint
from pipeline.config import QuantizeConfig, RoundingMethod, RoundingScales
from pipeline.errors import UserError
from pipeline.numerics.formats import MXFP4, NVFP4, BlockFormat
from pipeline.runs.artifacts import Artifact
from pipeline.runs.records import UpcastRecord


def find_packed(upcast: Artifact, settings: QuantizeConfig, block_format: BlockFormat) -> Checkpoint | None:
    """Return the MXFP4 checkpoint whose scales are the base's own: the upcast, or the source that it decoded.

    The source is opened only if its scales are used. Without an MXFP4 checkpoint, return None. MXFP4 scales can only
    become scales of MXFP4 and NVFP4, so return None for blocks of another form.

    Raises:
        UserError: `quantize.scales=base`, but neither checkpoint is packed, or the format has blocks of another form.
    """
    wants = settings.scales is RoundingScales.base
    if not any(block_format.stores_like(row) for row in (MXFP4, NVFP4)):
        if wants:
            raise UserError(
                f"quantize.scales=base: scales of an MXFP4 base do not fit the blocks of format={block_format.name}."
                " Use quantize.scales=ceil, floor or mse."
            )
        return None
    base = Checkpoint(upcast.directory)
    if base.is_packed:
        return base
    may_take = settings.method in (RoundingMethod.stochastic, RoundingMethod.auto) and settings.scales is None
    if not wants and not may_take:
        return None
    directory = Path(upcast.read(UpcastRecord).source)
    if directory.is_dir() and (source := Checkpoint(directory)).is_packed:
        return source
    if wants:
        state = "whose experts are not packed (MXFP4)" if directory.is_dir() else "which was removed"
        raise UserError(
            f"quantize.scales=base: {upcast.directory} was made from {directory}, {state}. Only packed experts have"
            " scales of their own. Use quantize.scales=ceil, floor or mse."
        )
    return None


def choose_rule(settings: QuantizeConfig, packed: Checkpoint | None, scale_rule: str) -> str | None:
    """Return the rule that chooses the scales, or None for the base's own scales.

    Args:
        settings: section `quantize` of the configuration.
        packed: the result of `find_packed`.
        scale_rule: value of format.scale_rule.
    """
    if settings.scales is not None:
        return None if settings.scales is RoundingScales.base else settings.scales.name
    takes_own = settings.method is RoundingMethod.stochastic and packed is not None
    return None if takes_own else scale_rule
