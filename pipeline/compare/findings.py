"""The comparison in words: what rounding lost, how much of it QAT won back, and what that cost.

A difference that the test does not show is never called one, and never called none: it is said which difference so many
prompts could have shown. Of losses only the mean is kept, so they come without an interval.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.compare.evidence import LOSS, Chain, Test, chains, format_pairs, pairs_of
from pipeline.compare.rows import PTQ, QAT, SFT, Row
from pipeline.evaluate.statistics import BETTER, WORSE

NOTHING = "no difference that the data carry"

_SERVED = "served_bytes"


@dataclass(frozen=True)
class Finding:
    """Some sentences under a title."""

    title: str
    sentences: list[str]


def findings(rows: list[Row], tested: list[Test]) -> list[Finding]:
    """What the report says first, a finding for each chain and each pair of formats."""
    found = [Finding(chain.title, list(_of_chain(chain, tested))) for chain in chains(rows)]
    if not found:
        found = [Finding("Nothing to compare", ["Neither a PTQ nor a QAT was evaluated (evaluate.source=all does)."])]
    return found + [
        Finding(f"{model.block_format} against {reference.block_format}", list(_of_formats(model, reference, tested)))
        for model, reference in format_pairs(rows)
    ]


def _of_chain(chain: Chain, tested: list[Test]) -> Iterator[str]:
    missing = [name for name, row in ((SFT, chain.sft), (PTQ, chain.ptq), (QAT, chain.qat)) if row is None]
    if missing:
        yield f"Not evaluated: {', '.join(missing)}; what was lost or recovered is told as far as it goes without."
    yield from _of_loss(chain)
    in_chain = {(id(model), id(reference)) for model, reference in pairs_of(chain)}
    of_chain = [test for test in tested if (id(test.model), id(test.reference)) in in_chain]
    for figure in dict.fromkeys(test.figure for test in of_chain):
        yield from _of_rate(chain, [test for test in of_chain if test.figure == figure])
    if not of_chain:
        yield "No answers were compared, so nothing here has been tested: losses are means alone (eval=quick asks)."
    yield from _of_cost(chain)


def _of_loss(chain: Chain) -> Iterator[str]:
    sft, ptq, qat = (None if row is None else row.figures.get(LOSS) for row in (chain.sft, chain.ptq, chain.qat))
    if sft and ptq:
        yield f"Validation loss: PTQ changed it by {_change(ptq, sft)} ({sft:.4f} to {ptq:.4f}, {_tokens(chain)})."
    if qat and ptq:
        share = f": {100 * (ptq - qat) / (ptq - sft):.0f} % of what PTQ had cost" if sft and qat < ptq > sft else ""
        yield f"Validation loss: QAT changed it by {_change(qat, ptq)} from PTQ ({ptq:.4f} to {qat:.4f}{share})."
    if qat and sft:
        more = (
            " QAT went on training on the same data, which alone may explain that it is lower."
            if qat < sft
            else " That is what is left."
        )
        yield f"Validation loss: SFT + QAT is {_change(qat, sft)} from SFT.{more}"


def _change(value: float, reference: float) -> str:
    return f"{100 * (value / reference - 1):+.2f} %"


def _tokens(chain: Chain) -> str:
    row = chain.ptq or chain.qat
    assert row is not None
    return f"{row.figures.get('supervised_tokens', 0):.0f} supervised tokens, no interval: only the mean is kept"


def _of_rate(chain: Chain, tested: list[Test]) -> Iterator[str]:
    by_pair = {(test.model.model, test.reference.model): test for test in tested}
    lost, won, left = (by_pair.get(pair) for pair in ((PTQ, SFT), (QAT, PTQ), (QAT, SFT)))
    if lost:
        yield f"{_name(lost)}: {_WHAT_PTQ_DID.get(lost.verdict, 'that PTQ changed it is not shown')}. {described(lost)}"
    if won:
        yield f"{_name(won)}: {_what_qat_did(lost, won)}. {described(won)}"
    if left:
        yield f"{_name(left)}: {_WHAT_IS_LEFT.get(left.verdict, _NOTHING_LEFT)}. {described(left)}"


def _name(test: Test) -> str:
    return test.figure.replace("_", " ").capitalize()


_WHAT_PTQ_DID = {WORSE: "PTQ lost", BETTER: "PTQ gained"}
_NOTHING_LEFT = "that QAT ended elsewhere than SFT is not shown"
_WHAT_IS_LEFT = {WORSE: "QAT did not win back all of SFT", BETTER: "QAT ended above SFT"}


def _what_qat_did(lost: Test | None, won: Test) -> str:
    if won.verdict == WORSE:
        return "QAT is worse than PTQ"
    if won.verdict != BETTER:
        return "that QAT changed it is not shown"
    if lost is None or lost.verdict != WORSE or lost.comparison is None or won.comparison is None:
        return "QAT gained over PTQ"
    share = won.comparison.difference / -lost.comparison.difference
    return f"QAT recovered {100 * share:.0f} % of what PTQ had lost"


def described(test: Test) -> str:
    """The evidence: the difference with its interval, the number of prompts, the corrected p-value."""
    names = f"{test.model.title} against {test.reference.title}"
    found = test.comparison
    if found is None:
        return f"{names}: {test.verdict}."
    return (
        f"{names}: {100 * found.difference:+.1f} points (95 % interval {100 * found.interval.low:+.1f} to"
        f" {100 * found.interval.high:+.1f}, {found.prompts} prompts, p = {test.p_value:.2g})"
        + ("." if test.is_shown else f": {NOTHING}; {test.verdict.partition(': ')[2]}.")
    )


def _of_cost(chain: Chain) -> Iterator[str]:
    sft, qat, end = chain.sft, chain.qat, chain.qat or chain.ptq
    if qat and qat.seconds is not None and qat.peak_bytes is not None:
        share = f", {qat.seconds / sft.seconds:.2f} times what SFT took" if sft and sft.seconds else ""
        yield f"Cost of QAT: {qat.seconds:.0f} s{share}; at most {size(qat.peak_bytes)} of memory."
    if end and sft and {_SERVED} <= end.figures.keys() & sft.figures.keys():
        served, whole = end.figures[_SERVED], sft.figures[_SERVED]
        yield (
            f"Size when served: {size(served)} in {end.block_format}, {whole / served:.2f} times smaller than SFT's"
            f" {size(whole)} in BF16."
        )


def _of_formats(model: Row, reference: Row, tested: list[Test]) -> Iterator[str]:
    names = f"{model.title} ({model.block_format}) and {reference.title} ({reference.block_format})"
    change = _change(model.figures[LOSS], reference.figures[LOSS])
    yield (
        f"The QAT of each format with the lowest validation loss, {names}: {change} validation loss, no interval."
        " They were chosen by that loss, on the same data, which flatters both."
    )
    if _SERVED in model.figures and _SERVED in reference.figures:
        yield f"Size when served: {size(model.figures[_SERVED])} against {size(reference.figures[_SERVED])}."
    of_pair = [test for test in tested if (id(test.model), id(test.reference)) == (id(model), id(reference))]
    for test in of_pair:
        yield f"{_name(test)}: {described(test)}"


def size(count: float) -> str:
    """Bytes, in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3f} MB"
