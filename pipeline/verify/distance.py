"""Measures the distance of an export from its base model, to distinguish fine-tuning from a wrong layout.

The check needs only the export and the base model, not the trained model.

Fine-tuning changes weights by a small part of their size. Values in a wrong order (nibbles, rows, experts, axes) are
uncorrelated with the base model's values. If scale bytes are off by one, values are doubled or halved. Two figures show
such errors. For a row e of the export and the same row b of the base model:

    similarity = <e, b> / (|e| |b|)    1 if nothing changed, about 0 for unrelated rows
    gain       = <e, b> / <b, b>       the factor that brings b closest to e: 2 or 1/2 if every scale is off by one

The effect of training was measured on the tiny random model. Its rows have only 64 or 96 values, so the figures vary
more than for a released model. The table shows the smallest similarity and the range of gains, for the rows of experts
and for the rows of other tensors:

    SFT rate  steps   QAT rate  steps   experts: similarity   gain           others: similarity   gain
    1e-3      80      1e-4      40               0.97         0.94 .. 1.06           0.97         0.94 .. 1.04
    3e-3      400     1e-3      200              0.79         0.82 .. 1.17           0.63         0.87 .. 1.33
    1e-2      200     1e-3      40               0.52         0.71 .. 1.33           0.57         0.83 .. 1.51

The rate 1e-2 is a thousand times the recommended rate for released models. For rows in a wrong order, the similarity
is 0 +- 0.13 in the tiny model. In a released model it is 0 +- 0.02, because its rows are longer.

Legend: E = experts; out, in = dimensions of a matrix. Each output has a row of `in` weights.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.checkpoints.gpt_oss import EMBEDDING, EXPERT_BIASES, ExpertProjection, expert_projections, other_tensors
from pipeline.errors import at_most
from pipeline.export.layout import Codes, View, decode_codes
from pipeline.numerics.codec import same_bits
from pipeline.numerics.compiled import compilation_for
from pipeline.numerics.formats import MXFP4
from pipeline.numerics.kernels import column_products
from pipeline.runs.console import progress
from pipeline.verify.check import Check

_LEAST_SIMILARITY = 0.4
_SAME = 0.7  # tensors count as the same from this similarity on; it is 0.5 if half of the rows are wrong
_LARGEST_GAIN = math.sqrt(2)  # geometric mean of 1 (right scales) and 2 (every scale byte is too high by one)
_FAINT = 1 / 64  # a row is not judged if its <b, b> is below this share of the mean over all rows


@dataclass(frozen=True)
class Rows:
    """Products of the rows e and b. Row e is from the export, row b from the base model. Fields are (rows) float64."""

    e_b: Tensor
    e_e: Tensor
    b_b: Tensor
    change: Tensor  # |e - b|^2

    @classmethod
    def multiply(cls, have: Tensor, want: Tensor) -> "Rows":
        """Multiply the rows of two tensors (..., in, rows) of the same shape, as `View.weights` returns them."""
        return cls(*column_products(have, want).double().flatten(1))

    @classmethod
    def concatenate(cls, several: Iterable["Rows"]) -> "Rows":
        """Concatenate rows."""
        return cls(*(torch.cat(of_each) for of_each in zip(*(vars(rows).values() for rows in several), strict=True)))

    def total(self) -> "Rows":
        """Return all rows as a single long row."""
        return Rows(*(products.sum().view(1) for products in vars(self).values()))

    @property
    def similarity(self) -> Tensor:
        """Cosine of the angle between e and b, shape (rows). NaN if one of them is zero."""
        return self.e_b / (self.e_e * self.b_b).sqrt()

    @property
    def gain(self) -> Tensor:
        """The factor that brings b closest to e, shape (rows)."""
        return self.e_b / self.b_b

    @property
    def is_judged(self) -> Tensor:
        """Whether b is large enough to be judged, shape (rows).

        Training can change a tiny row by more than its size.
        """
        return self.b_b > _FAINT * self.b_b.mean()

    def unlike(self, have_scales: bool) -> Tensor:
        """Return a bool for each row: True if training cannot have made e from b.

        The gain is checked only for weights with scales.
        """
        fits = self.similarity >= _LEAST_SIMILARITY
        if have_scales:
            fits &= (self.gain <= _LARGEST_GAIN) & (self.gain >= 1 / _LARGEST_GAIN)
        return ~fits & self.is_judged

    def figures(self) -> dict[str, float | None]:
        """Return the relative distance |e - b| / |b|, similarity and gain of all rows together.

        Also return the smallest similarity among the judged rows. A figure that is not finite becomes None.
        """
        whole, judged = self.total(), self.similarity[self.is_judged]
        values = {
            "relative_distance": float((whole.change / whole.b_b).sqrt()),
            "similarity": float(whole.similarity),
            "gain": float(whole.gain),
            "least_row_similarity": float(judged.min()) if len(judged) else math.nan,
        }
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


class Comparison(NamedTuple):
    """The result of comparing an export with its base model.

    Attributes:
        distance: check that training can have made the export from the base model.
        same: names of the tensors that are bit-identical in both models.
    """

    distance: Check
    same: set[str]


def compare(export: View, base: View) -> Comparison:
    """Compare every tensor of an export with the base model's tensor. Each is read and decoded once.

    The two models must have the same sizes. Memory holds one expert, or some rows of another tensor, at a time.
    """
    check = Check("distance: every tensor is finite and resembles the base model's")
    experts = {projection.name: projection for projection in expert_projections(export.shape)}
    same: set[str] = set()
    wrong: dict[str, str] = {}
    with compilation_for(2 * sum(projection.values for projection in experts.values())):
        for name in progress([*experts, *other_tensors(export.shape)], what="distance", unit="tensor"):
            rows, is_same = _compare_tensor(export, base, name)
            check.tensors[name] = rows.figures()
            same |= {name} if is_same else set()
            if problem := _describe_not_finite(name, rows) or _describe_unlike(
                export, base, name, rows=rows, projection=experts.get(name)
            ):
                wrong[name] = problem
    check.problems = list(wrong.values())
    if wrong.keys() >= {*experts, EMBEDDING}:
        check.problems = [
            "neither experts nor embeddings resemble those of the base model: the export was made from another base"
            " model. Set verify.reference to that model"
        ]
    zero = [name for name, figures in check.tensors.items() if figures["gain"] is None and name not in wrong]
    if zero:
        check.unseen = f"the distance of {', '.join(at_most(zero))}, because all values are zero in the base model"
    distances = [figures["relative_distance"] or 0.0 for figures in check.tensors.values()]
    check.measured = {"tensors": len(distances), "largest_relative_distance": max(distances)}
    return Comparison(check, same)


def _compare_tensor(export: View, base: View, name: str) -> tuple[Rows, bool]:
    """Multiply a tensor's rows in the export by the same rows in the base model.

    Also return whether the tensor is bit-identical in both models.

    A stack of experts has a row for each output, and a stack of expert biases has a row for each expert. Every other
    tensor is a single row.
    """
    have_many_rows = len(export.plain[name].shape) == 3 or name.endswith(EXPERT_BIASES)
    found, is_same = [], True
    for part in export.parts(name):
        have, want = _Part.read(export, name, part), _Part.read(base, name, part)
        is_same &= have.equals(want)
        rows = Rows.multiply(_in_columns(name, have.weights), _in_columns(name, want.weights))
        found.append(rows if have_many_rows else rows.total())
    rows = Rows.concatenate(found)
    return (rows if have_many_rows else rows.total()), is_same


class _Part(NamedTuple):
    """Some rows of a tensor: their weights, and their codes if the tensor is packed.

    The codec decodes packed weights. Experts are (E, in, out).
    """

    codes: Codes | None
    weights: Tensor

    @classmethod
    def read(cls, view: View, name: str, rows: slice) -> "_Part":
        codes = view.codes(name, rows)
        return cls(codes, view.weights(name, rows) if codes is None else decode_codes(codes))

    def equals(self, other: "_Part") -> bool:
        """Return whether two parts have the same bits.

        If both are packed in the same format, their codes and scales are compared. Otherwise their values are compared.
        """
        if self.codes is None or other.codes is None or self.codes.scales.dtype != other.codes.scales.dtype:
            return same_bits(self.weights, other.weights)
        return all(
            torch.equal(one.view(torch.uint8), two.view(torch.uint8))
            for one, two in zip(self.codes, other.codes, strict=True)
            if one is not None and two is not None
        )


def _in_columns(name: str, weights: Tensor) -> Tensor:
    """Arrange weights so that the values of a row lie along the second-to-last dimension."""
    if weights.dim() == 1:
        return weights.unsqueeze(-1)
    return weights.T.contiguous() if name.endswith(EXPERT_BIASES) else weights


def _describe_not_finite(name: str, rows: Rows) -> str | None:
    bad = int((~rows.e_e.isfinite()).sum())
    place = "" if len(rows.e_e) == 1 else f" in {bad} of {len(rows.e_e)} rows"
    return f"{name}: NaN or Inf, or values or scales too large to compare{place}" if bad else None


def _describe_unlike(
    export: View, base: View, name: str, *, rows: Rows, projection: ExpertProjection | None
) -> str | None:
    """Return None if a tensor resembles the base model's tensor. Otherwise describe it and what it resembles."""
    unlike = rows.unlike(have_scales=projection is not None)
    if not bool(unlike.any()):
        return None
    first = int(unlike.nonzero()[0])
    found = _describe_rows(name, rows, first, int(unlike.sum()))
    if projection is None:
        return f"{found}{_other_origin(export, base, name)}"
    return f"{found}{_expert_origin(export, base, projection, first // projection.out_features)}"


def _describe_rows(name: str, rows: Rows, first: int, count: int) -> str:
    figures = f"similarity {float(rows.similarity[first]):.3g}, gain {float(rows.gain[first]):.3g}"
    if (total := len(rows.b_b)) == 1:
        return f"{name}: does not resemble the base model's ({figures})"
    return f"{name}: {count} of {total} rows do not resemble the base model's ({figures} of the first)"


def _read_expert(view: View, projection: ExpertProjection, index: int) -> Tensor:
    """Read an expert as (out, in)."""
    return view.weights(projection.name, slice(index, index + 1))[0].T


def _alternate_halves(blocks: Tensor) -> Tensor:
    """Reorder (..., block) so that elements j and j + block / 2 of each block are next to each other."""
    return blocks.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _by_block(arrange: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda weight: arrange(weight.unflatten(-1, (-1, MXFP4.block_size))).flatten(-2)


ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "with swapped nibbles": lambda weight: weight.unflatten(-1, (-1, 2)).flip(-1).flatten(-2),
    "with the elements j and j + 16 of a block in one byte": _by_block(_alternate_halves),
    "with gate and up exchanged": lambda weight: weight.unflatten(0, (-1, 2)).flip(1).flatten(0, 1),
    "with gate and up in halves": lambda weight: torch.cat((weight[::2], weight[1::2])),
    "along the other axis": lambda weight: weight.T,
}
"""Known mistakes in the order of an expert's weights (out, in). The message names the mistake that matches."""


def _expert_origin(export: View, base: View, projection: ExpertProjection, expert: int) -> str:
    """Describe what an expert resembles: its own base weights in a wrong order, or another expert of the base model."""
    have, own = _read_expert(export, projection, expert), _read_expert(base, projection, expert)
    for name, arrange in ARRANGEMENTS.items():
        if _resembles(have, arrange(own)):
            return f"; expert {expert} resembles the base model's {name}"
    for other in range(projection.experts):
        if other != expert and _resembles(have, _read_expert(base, projection, other)):
            return f"; expert {expert} resembles the base model's expert {other}"
    return f"; the first such row belongs to expert {expert}"


def _other_origin(export: View, base: View, name: str) -> str:
    """Search the base model for another tensor that resembles the export's tensor `name`.

    Return the end of an error message, or "" if there is no such tensor.
    """
    for other, info in other_tensors(base.shape).items():
        if other != name and info.shape == base.plain[name].shape:
            pairs = ((export.weights(name, rows), base.weights(other, rows)) for rows in export.parts(name))
            rows = Rows.concatenate(
                Rows.multiply(*(_in_columns(name, each) for each in pair)).total() for pair in pairs
            ).total()
            if bool(rows.similarity >= _SAME):
                return f"; it resembles the base model's {other}"
    return ""


def _resembles(have: Tensor, want: Tensor) -> bool:
    return have.shape == want.shape and bool(Rows.multiply(have, want).total().similarity >= _SAME)
