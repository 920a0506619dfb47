"""What models answered, compared: which models belong together, and the tests between them.

Paired by prompt (McNemar's exact test); all tests of a report are corrected together (Holm).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from pipeline.compare.rows import PTQ, QAT, SFT, Row
from pipeline.evaluate import statistics
from pipeline.evaluate.statistics import BETTER, WORSE, Comparison
from pipeline.evaluate.verdicts import pair

LOSS = "validation_loss"


TEST_COLUMNS = (
    *("figure", "model", "reference", "verdict", "difference (points)", "95 % interval", "p (corrected)", "prompts"),
    *("only the model passed", "only the reference passed", "what could be shown"),
)


@dataclass(frozen=True)
class Chain:
    """A QAT or PTQ and what it is held against; None what was not evaluated."""

    sft: Row | None
    ptq: Row | None
    qat: Row | None

    @property
    def title(self) -> str:
        """Its models, in order."""
        return " → ".join(row.title for row in (self.sft, self.ptq, self.qat) if row is not None)


@dataclass(frozen=True)
class Test:
    """A model against a reference on the same prompts.

    Attributes:
        figure: a pass rate.
        comparison: None where there is no prompt that could be decided for both.
        p_value: corrected for all tests of the report.
        verdict: in words, as `statistics.verdicts`.
    """

    figure: str
    model: Row
    reference: Row
    comparison: Comparison | None
    p_value: float
    verdict: str

    def plain(self) -> dict[str, Any]:
        """The test as compare.json has it."""
        found = {"figure": self.figure, "model": self.model.title, "reference": self.reference.title}
        figures = (
            {} if self.comparison is None else asdict(self.comparison) | {"difference": self.comparison.difference}
        )
        return {**found, **figures, "p_value_corrected": self.p_value, "verdict": self.verdict}

    def cells(self) -> list[str]:
        """The test as a line of a table: a cell for each of TEST_COLUMNS."""
        names = [self.figure.replace("_", " "), self.model.title, self.reference.title]
        short, _, smallest = self.verdict.partition(": ")
        if (found := self.comparison) is None:
            return [*names, short, "–", "–", "–", "0", "–", "–", "–"]
        difference, low, high = (
            f"{100 * each:+.1f}" for each in (found.difference, found.interval.low, found.interval.high)
        )
        counts = [str(found.prompts), str(found.wins), str(found.losses)]
        told = [short if self.is_shown else "not shown", difference, f"{low} to {high}", f"{self.p_value:.2g}"]
        return [*names, *told, *counts, smallest]

    @property
    def is_shown(self) -> bool:
        """Whether the test shows a difference."""
        return self.verdict in (BETTER, WORSE)


def chains(rows: list[Row]) -> list[Chain]:
    """Every QAT with its PTQ and its SFT, and every PTQ that no QAT went on from."""
    found = [Chain(_origin(row, SFT, rows), _origin(row, PTQ, rows), row) for row in rows if row.model == QAT]
    used = {id(chain.ptq) for chain in found}
    return found + [
        Chain(_origin(row, SFT, rows), row, None) for row in rows if row.model == PTQ and id(row) not in used
    ]


def _origin(row: Row, stage: str, rows: list[Row]) -> Row | None:
    """The row that a row was made from, in whichever run it was measured."""
    wanted = row.lineage.get(stage)
    return next((each for each in rows if each.model == stage and each.fingerprint == wanted), None)


def tests(rows: list[Row]) -> list[Test]:
    """All paired tests of the report: in each chain, and between the best QAT of each format."""
    pairs = [pair for chain in chains(rows) for pair in pairs_of(chain)] + format_pairs(rows)
    distinct = {(id(model), id(reference)): (model, reference) for model, reference in pairs}.values()
    found = [(figure, *pair, _compared(figure, *pair)) for pair in distinct for figure in _common(*pair)]
    compared = [comparison for *_, comparison in found if comparison is not None]
    corrected = statistics.holm(np.array([each.p_value for each in compared]))
    told = iter(zip(corrected, statistics.verdicts(compared), strict=True))
    unknown = (1.0, "no prompt could be decided for both")
    return [Test(*each, *(next(told) if each[-1] is not None else unknown)) for each in found]


def pairs_of(chain: Chain) -> Iterator[tuple[Row, Row]]:
    """Model and reference: PTQ and SFT, QAT and PTQ, QAT and SFT."""
    for model, reference in ((chain.ptq, chain.sft), (chain.qat, chain.ptq), (chain.qat, chain.sft)):
        if model is not None and reference is not None:
            yield model, reference


def format_pairs(rows: list[Row]) -> list[tuple[Row, Row]]:
    """The QAT of each format with the lowest validation loss, against that of each other format."""
    best: dict[str, Row] = {}
    for row in rows:
        if row.model == QAT and row.block_format is not None and LOSS in row.figures:
            held = best.get(row.block_format)
            if held is None or row.figures[LOSS] < held.figures[LOSS]:
                best[row.block_format] = row
    return [(second, first) for first, second in combinations(best.values(), 2)]


def _common(model: Row, reference: Row) -> list[str]:
    return [figure for figure in model.verdicts if figure in reference.verdicts]


def _compared(figure: str, model: Row, reference: Row) -> Comparison | None:
    """Of several samples the first, or the pairs would not be independent."""
    first = ([each for each in row.verdicts[figure] if each.sample == 0] for row in (model, reference))
    passed = pair(*first)
    return statistics.compare(*passed) if len(passed[0]) else None
