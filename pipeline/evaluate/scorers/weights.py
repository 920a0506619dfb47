"""Compare expert weights with the reference's: the relative error, and the share of 4-bit values that differ."""

import math

from torch import Tensor

from pipeline.checkpoints.gpt_oss import expert_projections
from pipeline.evaluate.subject import Subject
from pipeline.numerics.codec import fake_quantize
from pipeline.numerics.comparison import differences
from pipeline.numerics.formats import MXFP4, BlockFormat
from pipeline.runs.console import progress


def score(subject: Subject) -> dict[str, float]:
    """Compare the expert weights W of the forward pass with the reference's expert weights R.

    Returns:
        `relative_weight_error`: ||W - R|| / ||R||.
        `snr_db`: the signal-to-noise ratio, 20 log10(||R|| / ||W - R||), absent if there is no error.
        `flipped_codes`: the share of weights whose 4-bit value differs between W and R. W and R are rounded to
            the subject's format, or to MXFP4 if the subject has no format. The share is large if training has changed
            many rounded values. The share is 0 if the subject is the reference after PTQ.
    """
    if subject.ref is None or subject.weights is None or subject.reference is None:
        return {}
    error = norm = flipped = count = 0.0
    projections = expert_projections(subject.weights.shape)
    for projection in progress(projections, what=f"weights of {subject.ref.name}", unit="tensor"):
        effective, references = (each.read_effective(projection.name) for each in (subject.weights, subject.reference))
        importance = subject.weights.importance(projection.name)
        for pair in zip(effective.split(1), references.split(1), strict=True):  # one expert at a time saves memory
            squared_error, squares, flips = _difference(*pair, subject.ref.block_format, importance)
            error, norm, flipped = error + squared_error, norm + squares, flipped + flips
        count += effective.numel()
    ratio = error / norm if norm else 0.0
    decibels = {"snr_db": -10 * math.log10(ratio)} if ratio else {}
    return {"relative_weight_error": math.sqrt(ratio), **decibels, "flipped_codes": flipped / count}


def _difference(
    weights: Tensor, reference: Tensor, block_format: BlockFormat | None, importance: Tensor | None
) -> tuple[float, float, float]:
    """Sum up squared errors, squares of the reference, and flipped codes. Both weights have the shape (1, in, out)."""
    codes = _round(weights, MXFP4, None) if block_format is None else weights
    codes_of_reference = _round(reference, block_format or MXFP4, importance)
    squared_error, squares, *_ = differences((reference, weights, reference, weights)).tolist()
    *_, flipped = differences((codes, codes, codes_of_reference, codes_of_reference)).tolist()
    return squared_error, squares, flipped


def _round(weights: Tensor, block_format: BlockFormat, importance: Tensor | None) -> Tensor:
    return fake_quantize(weights.transpose(1, 2), block_format, importance=importance).transpose(1, 2)
