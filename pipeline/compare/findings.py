"""Describe the results in sentences: the quality that PTQ lost, the share that QAT recovered, and the cost of QAT.

If a test is not significant, the models may differ or be equal. So its sentence claims neither. It states the smallest
difference that the test could have detected. Losses have no interval, because only their mean is stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.compare.digits import size
from pipeline.compare.evidence import KL, LOSS, NOTHING, Chain, Test, find_chains, format_pairs, pairs_of
from pipeline.compare.names import PTQ, QAT, SFT, figure_title
from pipeline.compare.rows import PATIENCE, Row, control_of
from pipeline.config.controls import is_control
from pipeline.config.pipeline import MORE_SFT
from pipeline.evaluate.statistics import BETTER, WORSE

_SERVED = "served_bytes"
_DIGITS = 4  # of a loss. Losses that are equal as printed count as equal.
_EFFECTS_OF_PTQ = {WORSE: "PTQ is worse than SFT", BETTER: "PTQ is better than SFT"}
_AGAINST_CONTROL = {WORSE: "the best control is better than QAT", BETTER: "QAT is better than the best control"}
_GAPS_TO_SFT = {WORSE: "QAT did not fully recover to SFT", BETTER: "QAT is better than SFT"}


@dataclass(frozen=True)
class Finding:
    """A section of the results: a title and its sentences."""

    title: str
    sentences: list[str]


def describe(rows: list[Row], tests: list[Test]) -> list[Finding]:
    """Describe each chain of models, and compare each pair of formats."""
    found = [Finding(chain.title, list(_describe_chain(chain, tests))) for chain in find_chains(rows)]
    unrounded = [
        row for row in rows if row.model == SFT and row.block_format is not None and not _is_rounded(row, rows)
    ]
    found += [Finding(f"{row.title}: nothing was rounded", [_describe_unrounded(row)]) for row in unrounded]
    if not found:
        advice = "No PTQ or QAT model was evaluated. evaluate.source=all evaluates every stage."
        found = [Finding("Nothing to compare", [advice])]
    return found + [
        Finding(
            f"{model.block_format} against {reference.block_format}", list(_describe_formats(model, reference, tests))
        )
        for model, reference in format_pairs(rows)
    ]


def _is_rounded(sft: Row, rows: list[Row]) -> bool:
    """Return whether PTQ or QAT was made from an SFT model, as for another format than the original's."""
    return any(row.model in (PTQ, QAT) and row.lineage.get(SFT) == sft.fingerprint for row in rows)


def _describe_unrounded(row: Row) -> str:
    return (
        f"Training left the experts in the {row.block_format} of the original. So the export computes like this model,"
        " and needs neither PTQ nor QAT."
    )


def _describe_chain(chain: Chain, tests: list[Test]) -> Iterator[str]:
    missing = [name for name, row in ((SFT, chain.sft), (PTQ, chain.ptq), (QAT, chain.qat)) if row is None]
    if missing:
        yield f"Not evaluated: {', '.join(missing)}. Comparisons with missing models are left out."
    yield from _describe_verdict(chain)
    yield from _describe_losses(chain)
    yield from _describe_rounding(chain)
    in_chain = {(id(model), id(reference)) for model, reference in pairs_of(chain)}
    own_tests = [test for test in tests if (id(test.model), id(test.reference)) in in_chain]
    for figure in dict.fromkeys(test.figure for test in own_tests):
        yield from _describe_rate([test for test in own_tests if test.figure == figure])
        yield from (_describe_control(test) for test in own_tests if test.figure == figure and _has_control(test))
    if not own_tests:
        yield "No answers were compared, so no difference was tested. To compare answers, evaluate with eval=full."
    yield from _describe_cost(chain)


def _describe_verdict(chain: Chain) -> Iterator[str]:
    """Compare QAT with the best control. Without controls, say what the comparison with PTQ is worth."""
    qat, best = chain.qat, chain.best_control
    if qat is None or LOSS not in qat.figures or SFT not in qat.lineage:
        return
    if best is None:
        yield (
            "Without controls, the comparison with PTQ overstates QAT, because more steps of SFT and a better rounding"
            " also lower the loss (controls=true makes them)."
        )
        return
    figures = f"validation loss {_pair(best, qat, LOSS)}"
    if KL in best.figures and KL in qat.figures:
        figures += f", KL divergence from SFT {_pair(best, qat, KL)}"
    loss, own = (round(row.figures[LOSS], _DIGITS) for row in (best, qat))
    if loss < own:
        yield f"Verdict: {best.role} does better than QAT: {figures}. To export it, set export.source={best.model}."
    else:
        kind = "does not do better than" if loss > own else "does as well as"
        yield f"Verdict: the best control, {best.role}, {kind} QAT: {figures}."
    yield from _describe_choice(chain)


def _pair(model: Row, reference: Row, figure: str) -> str:
    return f"{model.figures[figure]:.{_DIGITS}f} against {reference.figures[figure]:.{_DIGITS}f}"


def _describe_choice(chain: Chain) -> Iterator[str]:
    """Say how far the choice of the best control can be trusted."""
    yield (
        f"The best of {len(chain.rivals)} controls was chosen by its loss on the same data, so this loss is slightly"
        " optimistic. The losses have no interval."
    )
    more = next((row for row in chain.rivals if control_of(row.model) == MORE_SFT), None)
    if more is None:
        yield f"{MORE_SFT} was not evaluated, so QAT may owe its loss to more training."
    elif chain.qat is not None:
        yield from _describe_steps(chain.qat, more)


def _describe_steps(qat: Row, more: Row) -> Iterator[str]:
    """Say whether QAT and more SFT trained for other numbers of steps. Early stopping may end them differently."""
    differences = [
        f"{name}={value} against {more.schedule.get(name)}"
        for name, value in qat.schedule.items()
        if more.schedule.get(name) != value
    ]
    if differences:
        yield f"QAT and {more.role} were set to other steps: {', '.join(differences)}. Make the control again."
    elif more.steps != qat.steps and qat.schedule.get(PATIENCE) is not None:
        yield f"Early stopping ended QAT after {qat.steps} steps, and {more.role} after {more.steps}."
    elif more.steps != qat.steps:
        yield f"QAT had {qat.steps} steps, but {more.role} had {more.steps}. Make the control again."


def _describe_losses(chain: Chain) -> Iterator[str]:
    sft, ptq, qat = (None if row is None else row.figures.get(LOSS) for row in (chain.sft, chain.ptq, chain.qat))
    if sft and ptq:
        yield f"Validation loss: PTQ changed it by {_change(ptq, sft)} ({sft:.4f} to {ptq:.4f}, {_tokens(chain)})."
    if qat and ptq:
        share = (
            f"; recovers {100 * (ptq - qat) / (ptq - sft):.0f} % of PTQ's increase" if sft and qat < ptq > sft else ""
        )
        yield f"Validation loss: QAT changed PTQ's loss by {_change(qat, ptq)} ({ptq:.4f} to {qat:.4f}{share})."
    if qat and sft:
        remark = (
            "QAT continued training on the same data, which alone may explain the lower loss."
            if qat < sft
            else "This difference remains after QAT."
        )
        yield f"Validation loss: SFT + QAT differs by {_change(qat, sft)} from SFT. {remark}"


def _describe_rounding(chain: Chain) -> Iterator[str]:
    """Describe how much of the experts' change the rounding of each model keeps."""
    for name, row in (("PTQ", chain.ptq), ("QAT", chain.qat)):
        if row is None or row.rounding is None:
            continue
        account = row.rounding.account
        if account["kept"] is None:
            yield f"Rounding of {name} ({row.rounding.method}): training did not change the experts."
            continue
        yield (
            f"Rounding of {name} ({row.rounding.method}): training changed the experts by"
            f" {100 * account['relative_change']:.2f} %. Rounding keeps {100 * account['kept']:.0f} % of this change on"
            f" average, moves {100 * account['changed_codes']:.2f} % of the 4-bit values, and adds"
            f" {100 * account['noise']:.2f} % noise."
        )


def _change(value: float, reference: float) -> str:
    return f"{100 * (value / reference - 1):+.2f} %"


def _tokens(chain: Chain) -> str:
    row = chain.ptq or chain.qat
    assert row is not None
    count = row.figures.get("supervised_tokens", 0)
    return f"{count:.0f} supervised tokens, no interval because only the mean is stored"


def _describe_rate(tests: list[Test]) -> Iterator[str]:
    """Describe the tests of one pass rate in one chain."""
    by_pair = {(test.model.model, test.reference.model): test for test in tests}
    lost, recovered, remaining = (by_pair.get(pair) for pair in ((PTQ, SFT), (QAT, PTQ), (QAT, SFT)))
    if lost:
        yield _summarize(lost, _EFFECTS_OF_PTQ.get(lost.verdict, "the test shows no effect of PTQ"))
    if recovered:
        yield _summarize(recovered, _effect_of_qat(lost, recovered))
    if remaining:
        yield _summarize(remaining, _GAPS_TO_SFT.get(remaining.verdict, "the test shows no gap between QAT and SFT"))


def _has_control(test: Test) -> bool:
    return is_control(test.reference.model)


def _describe_control(test: Test) -> str:
    unclear = "the test shows no difference between QAT and the best control"
    return _summarize(test, _AGAINST_CONTROL.get(test.verdict, unclear))


def _summarize(test: Test, summary: str) -> str:
    return f"{_name(test)}: {'not tested' if test.comparison is None else summary}. {describe_test(test)}"


def _name(test: Test) -> str:
    return figure_title(test.figure)


def _effect_of_qat(lost: Test | None, recovered: Test) -> str:
    if recovered.verdict == WORSE:
        return "QAT is worse than PTQ"
    if recovered.verdict != BETTER:
        return "the test shows no effect of QAT"
    if lost is None or lost.verdict != WORSE or lost.comparison is None or recovered.comparison is None:
        return "QAT is better than PTQ"
    share = recovered.comparison.difference / -lost.comparison.difference
    return f"QAT recovered {100 * share:.0f} % of the loss from PTQ"


def describe_test(test: Test) -> str:
    """Describe a test: the difference with its interval, the number of prompts, and the corrected p-value."""
    names = f"{test.model.title} against {test.reference.title}"
    found = test.comparison
    if found is None:
        return f"{names}: {test.verdict}."
    return (
        f"{names}: {100 * found.difference:+.1f} points (95 % interval {100 * found.interval.low:+.1f} to"
        f" {100 * found.interval.high:+.1f}, {found.prompts} prompts, p = {test.p_value:.2g})"
        + ("." if test.is_significant else f": {NOTHING}; {test.needed}.")
    )


def _describe_cost(chain: Chain) -> Iterator[str]:
    sft, qat, end = chain.sft, chain.qat, chain.qat or chain.ptq
    if qat and qat.seconds is not None and qat.peak_bytes is not None:
        share = f", {qat.seconds / sft.seconds:.2f} times the duration of SFT" if sft and sft.seconds else ""
        yield f"Cost of QAT: {qat.seconds:.0f} s{share}; peak memory {size(qat.peak_bytes)}."
    if end and sft and {_SERVED} <= end.figures.keys() & sft.figures.keys():
        shipped = chain.export or end
        served, whole = shipped.figures[_SERVED], sft.figures[_SERVED]
        yield (
            f"Size when served: {size(served)} in {shipped.block_format or 'BF16'}. SFT takes {size(whole)} in"
            f" {sft.block_format or 'BF16'}, which is {whole / served:.2f} times as much."
        )


def _describe_formats(model: Row, reference: Row, tests: list[Test]) -> Iterator[str]:
    names = f"{model.title} ({model.block_format}) and {reference.title} ({reference.block_format})"
    change = _change(model.figures[LOSS], reference.figures[LOSS])
    yield (
        f"Best QAT models of the two formats: {names}. The first model's validation loss differs by {change} from the"
        " second model's (no interval). Both models were chosen by this loss on the same data, so their losses are"
        " optimistic."
    )
    if _SERVED in model.figures and _SERVED in reference.figures:
        yield f"Size when served: {size(model.figures[_SERVED])} against {size(reference.figures[_SERVED])}."
    for test in tests:
        if (id(test.model), id(test.reference)) == (id(model), id(reference)):
            yield f"{_name(test)}: {describe_test(test)}"
