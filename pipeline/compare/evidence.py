"""Choose pairs of models, and test whether their answers differ in quality.

The test is McNemar's exact test, paired by prompt. Holm's method corrects the p-values for the number of tests in the
report.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from pipeline.compare.names import EXPORT, PTQ, QAT, SFT, UPCAST, figure_name
from pipeline.compare.rows import Row
from pipeline.config.controls import is_control
from pipeline.evaluate import statistics
from pipeline.evaluate.statistics import BETTER, WORSE, Comparison
from pipeline.evaluate.verdicts import pair
from pipeline.runs.json_files import Json

NOTHING = "no significant difference"
LOSS = "validation_loss"
KL = "kl_divergence"

TEST_COLUMNS = (
    *("figure", "model", "reference", "verdict", "difference (points)", "95 % interval", "p (corrected)", "prompts"),
    *("only the model passed", "only the reference passed", "what could be shown"),
)
"""Fields of tests.jsonl."""

TEST_TITLES = (*TEST_COLUMNS[:-1], "needed for significance")
"""Headings of the TEST_COLUMNS in the HTML page."""


@dataclass(frozen=True)
class Chain:
    """An SFT model and the PTQ and QAT models made from it. None stands for a model that was not evaluated.

    `controls` are the controls of the run with the QAT model. `export` is the export of the last model.
    """

    sft: Row | None
    ptq: Row | None
    qat: Row | None
    controls: Sequence[Row] = ()
    export: Row | None = None

    @property
    def rivals(self) -> list[Row]:
        """The controls with the 4-bit format of QAT and a known loss. PTQ is one, too. Empty without further ones."""
        measured = [row for row in (self.ptq, *self.controls) if row is not None and LOSS in row.figures]
        own = None if self.qat is None else self.qat.block_format
        rounded = [row for row in measured if row.block_format is not None and row.block_format == own]
        return rounded if any(is_control(row.model) for row in rounded) else []

    @property
    def best_control(self) -> Row | None:
        """The rival with the lowest validation loss, or None if there are no rivals."""
        return min(self.rivals, key=lambda row: (row.figures[LOSS], row.figures.get(KL, 0.0)), default=None)

    @property
    def title(self) -> str:
        """The titles of the evaluated models, in order."""
        return " → ".join(row.title for row in (self.sft, self.ptq, self.qat) if row is not None)


@dataclass(frozen=True)
class Test:
    """A paired test of a model against a reference, on the same prompts.

    Attributes:
        figure: name of the pass rate.
        model: the tested model.
        reference: the model to compare with.
        comparison: the counts and the interval; None if no prompt was decided for both models.
        p_value: p-value, corrected for all tests of the report.
        verdict: the outcome in words, from `statistics.verdicts`.
        needed: the smallest difference that would be significant, in words. It is empty if the measured difference is
            significant.
    """

    figure: str
    model: Row
    reference: Row
    comparison: Comparison | None
    p_value: float
    verdict: str
    needed: str

    def to_json(self) -> dict[str, Json]:
        """Return the entry of this test in compare.json."""
        found = {"figure": self.figure, "model": self.model.name, "reference": self.reference.name}
        figures = (
            {} if self.comparison is None else asdict(self.comparison) | {"difference": self.comparison.difference}
        )
        return {**found, **figures, "p_value_corrected": self.p_value, "verdict": self.verdict}

    def cells(self) -> list[str]:
        """Return the test as a line of a table, with one cell for each of TEST_COLUMNS."""
        names = [figure_name(self.figure), self.model.title, self.reference.title]
        if (found := self.comparison) is None:
            return [*names, self.verdict, "–", "–", "–", "0", "–", "–", "–"]
        difference, low, high = (
            f"{100 * each:+.1f}" for each in (found.difference, found.interval.low, found.interval.high)
        )
        verdict = self.verdict if self.is_significant else NOTHING
        counts = [str(found.prompts), str(found.wins), str(found.losses)]
        return [*names, verdict, difference, f"{low} to {high}", f"{self.p_value:.2g}", *counts, self.needed]

    @property
    def is_significant(self) -> bool:
        """Whether the difference is statistically significant."""
        return self.verdict in (BETTER, WORSE)


def find_chains(rows: list[Row]) -> list[Chain]:
    """Find the chains of models.

    Each QAT model forms a chain with its PTQ and SFT models. Each remaining PTQ model forms a chain with its SFT model.
    """
    found = [
        Chain(_origin(row, SFT, rows), _origin(row, PTQ, rows), row, _controls(row, rows), _export(row, rows))
        for row in rows
        if row.model == QAT
    ]
    used = {id(chain.ptq) for chain in found}
    return found + [
        Chain(_origin(row, SFT, rows), row, None, export=_export(row, rows))
        for row in rows
        if row.model == PTQ and id(row) not in used
    ]


def _controls(qat: Row, rows: list[Row]) -> list[Row]:
    """Find the controls that were evaluated with a QAT model, by their fingerprints.

    Runs of a sweep may share a control's row, and the row then belongs to only one of them.
    """
    evaluated = qat.run.evaluated.parents
    return [row for row in rows if is_control(row.model) and row.fingerprint == evaluated.get(row.model)]


def _export(row: Row, rows: list[Row]) -> Row | None:
    return next((each for each in rows if each.model == EXPORT and each.twin == row.fingerprint), None)


def _origin(row: Row, stage: str, rows: list[Row]) -> Row | None:
    """Find the ancestor of a row's model: the model that `stage` made. Any run may have evaluated it."""
    wanted = row.lineage.get(stage)
    return next((each for each in rows if each.model == stage and each.fingerprint == wanted), None)


def reference_of(row: Row, rows: list[Row]) -> Row | None:
    """Find the model that a rounded model must match: the SFT model in its lineage, or without SFT the original."""
    return _origin(row, SFT if SFT in row.lineage else UPCAST, rows)


def run_tests(rows: list[Row]) -> list[Test]:
    """Run all paired tests.

    Tested are the exports against the models that they must match, the models of each chain against each other, and the
    best QAT models of different formats.
    """
    exports = [(row, reference) for row in rows if row.model == EXPORT and (reference := reference_of(row, rows))]
    pairs = exports + [pair for chain in find_chains(rows) for pair in pairs_of(chain)] + format_pairs(rows)
    distinct = {(id(model), id(reference)): (model, reference) for model, reference in pairs}.values()
    found = [(figure, *pair, _compare(figure, *pair)) for pair in distinct for figure in _common_figures(*pair)]
    compared = [comparison for *_, comparison in found if comparison is not None]
    p_values = statistics.holm(np.array([each.p_value for each in compared]))
    verdicts = statistics.verdicts(compared)
    needed = [
        "" if verdict in (BETTER, WORSE) else statistics.needed_difference(each, len(compared))
        for each, verdict in zip(compared, verdicts, strict=True)
    ]
    outcomes = iter(zip(p_values, verdicts, needed, strict=True))
    undecided = (1.0, "no prompt was decided for both models", "")
    return [Test(*each, *(next(outcomes) if each[-1] is not None else undecided)) for each in found]


def compare_with_itself(row: Row) -> list[Test]:
    """Compare the answers of a model with themselves, for an export that was proven to compute like its reference."""
    found = [(figure, _compare(figure, row, row)) for figure in row.verdicts]
    return [Test(figure, row, row, comparison, 1.0, NOTHING, "") for figure, comparison in found]


def pairs_of(chain: Chain) -> Iterator[tuple[Row, Row]]:
    """Yield pairs of (model, reference): PTQ and QAT against SFT, and QAT against PTQ and the best control."""
    for model, reference in ((chain.ptq, chain.sft), (chain.qat, chain.ptq), (chain.qat, chain.sft)):
        if model is not None and reference is not None:
            yield model, reference
    if chain.qat is not None and chain.best_control not in (None, chain.ptq):
        assert chain.best_control is not None
        yield chain.qat, chain.best_control


def format_pairs(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Find the QAT model with the lowest validation loss in each format, and pair these models with each other."""
    best: dict[str, Row] = {}
    for row in rows:
        if row.model == QAT and row.block_format is not None and LOSS in row.figures:
            held = best.get(row.block_format)
            if held is None or row.figures[LOSS] < held.figures[LOSS]:
                best[row.block_format] = row
    return [(second, first) for first, second in combinations(best.values(), 2)]


def _common_figures(model: Row, reference: Row) -> list[str]:
    return [figure for figure in model.verdicts if figure in reference.verdicts]


def _compare(figure: str, model: Row, reference: Row) -> Comparison | None:
    """Compare the first answer to each prompt. Several answers to one prompt would not be independent pairs."""
    first = ([each for each in row.verdicts[figure] if each.sample == 0] for row in (model, reference))
    passed = pair(*first)
    return statistics.compare(*passed) if len(passed[0]) else None
