"""Counts the blocks of an MXFP4 checkpoint by their largest code, while it is read or in a sample.

Legend: E = experts, out = output dimension, nb = blocks per row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipeline.checkpoints.gpt_oss import expert_projections
from pipeline.checkpoints.notes import Note
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import Part, Piece, Step
from pipeline.numerics.formats import E8M0_BIAS
from pipeline.numerics.largest_codes import MAGNITUDES, count_largest

SAMPLED_EXPERTS = 2
"""Number of experts of each stack in a sample. The sample has 0.6 GB for 20b, and 0.9 GB for 120b."""

CodeFigures = dict[str, Any]
"""Figures of a checkpoint.

- `blocks`: number of counted blocks.
- `sampled_experts`: number of counted experts in each stack, or None if all experts were counted.
- `shares`: magnitude ("0" to "6") -> share of the blocks in which it is the largest.
- `scale_exponents`: smallest and largest exponent of the scales.
"""


@dataclass
class BlockCounts:
    """Counts of the blocks that were read so far.

    Attributes:
        codes: number of blocks for each largest code.
        scales: smallest and largest scale byte.
    """

    codes: list[int] = field(default_factory=lambda: [0] * len(MAGNITUDES))
    scales: tuple[int, int] = (255, 0)

    def add(self, blocks: Tensor, scales: Tensor) -> None:
        """Count blocks (E, out, nb, 16) with scale bytes (E, out, nb). Both are uint8."""
        self.codes = [sum(pair) for pair in zip(self.codes, count_largest(blocks).tolist(), strict=True)]
        self._widen(int(scales.min()), int(scales.max()))

    def add_note(self, note: Note) -> None:
        """Add the counts of a note."""
        self.codes = [sum(pair) for pair in zip(self.codes, note["codes"], strict=True)]
        smallest, largest = note["scales"]
        self._widen(smallest, largest)

    def note(self) -> Note:
        """Return the counts, for the note of a piece."""
        return {"codes": self.codes, "scales": list(self.scales)}

    def figures(self, sampled_experts: int | None = None) -> CodeFigures:
        """Convert the counts to `CodeFigures`."""
        blocks = sum(self.codes)
        return {
            "blocks": blocks,
            "sampled_experts": sampled_experts,
            "shares": {f"{size:g}": count / blocks for size, count in zip(MAGNITUDES, self.codes, strict=True)},
            "scale_exponents": [byte - E8M0_BIAS for byte in self.scales],
        }

    def _widen(self, low: int, high: int) -> None:
        self.scales = min(self.scales[0], low), max(self.scales[1], high)


def sample(checkpoint: Checkpoint) -> CodeFigures:
    """Count the blocks of the first experts of each stack of a packed checkpoint."""
    counts, experts = BlockCounts(), checkpoint.shape.num_local_experts
    for projection in expert_projections(checkpoint.shape):
        counts.add(*checkpoint.read_stored(projection.name, slice(0, min(SAMPLED_EXPERTS, experts))))
    return counts.figures(SAMPLED_EXPERTS if experts > SAMPLED_EXPERTS else None)


def add_counting(piece: Piece) -> Piece:
    """Return a piece that makes the same tensors, and counts the packed experts that it reads.

    The steps of `piece` must read blocks and scales. The counts are the note of the piece.
    """
    counts = BlockCounts()

    def counted(step: Step) -> Step:
        def convert(stored: tuple[Tensor, ...]) -> Iterable[Part]:
            counts.add(*stored)
            return step.convert(stored)

        return Step(step.read, convert)

    def steps() -> Iterator[Step]:
        return (counted(step) for step in piece.steps())

    return Piece(piece.tensors, steps, counts.note)


def total(notes: Iterable[Note]) -> CodeFigures | None:
    """Add up the notes that have counts. Return None if there is no such note."""
    counts = BlockCounts()
    for note in (each for each in notes if "codes" in each):
        counts.add_note(note)
    return counts.figures() if any(counts.codes) else None


def describe(found: CodeFigures) -> str:
    """Describe the figures in words."""
    shares = [f"{size} in {share:.1%}" for size, share in reversed(found["shares"].items()) if share]
    low, high = found["scale_exponents"]
    sampled = found["sampled_experts"]
    how = "" if sampled is None else f" (a sample: the first {sampled} experts of each layer)"
    return f"largest code per block: {', '.join(shares)}; scales 2^{low} to 2^{high}{how}"
