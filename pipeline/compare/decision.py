"""Decide whether an export can be shipped. Pure functions: this module reads no files.

The rule has four conditions, and `state_rule` states them for readers:

1. No pass rate of the export is significantly worse than the reference's. The test is McNemar's, corrected by Holm's
   method, as in `evidence`. The validation loss is finite, and neither a training stage nor all steps together raised
   it by more than `MOST_RISE`. Pass rates alone do not show a ruined model if they hardly differ between good and bad
   models.
2. `verify` has passed on the export. If it compared the export with the base model alone, the headline says so.
3. The answers exclude a loss of quality beyond the margin. For each pass rate, the 95 % interval of the paired
   difference must not reach below -margin. This is a test of non-inferiority (CPMP/EWP/2158/99). A test without a
   significant result does not show equality, so the first condition alone would ship any export on a few prompts.
   An answer that cannot be judged takes no part in the comparison, so only few such answers are allowed.
4. The answers can show a loss. Two models that fail every prompt agree on all of them, so each pass rate of the
   reference must be at least `LEAST_MARGINS` times the margin. The form of an answer does not decide alone, and at most
   `MOST_TRUNCATED` of the answers of either model may have reached the limit of tokens.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from pipeline.compare.names import figure_name
from pipeline.evaluate.statistics import BETTER, WORSE, difference_interval
from pipeline.training.symptoms import MOST_RISE

LEAST_MARGINS = 2
"""Lowest pass rate of the reference that can show a loss, in margins. The margin is then at most half of the rate."""
MOST_TRUNCATED = 0.5
"""Largest share of a model's answers that may reach the limit of tokens."""


class Outcome(Enum):
    """The outcomes, from the most to the least urgent. The value begins the headline."""

    do_not_ship = "Do not ship"
    not_verified = "Do not ship yet"
    not_measured = "Not measured"
    not_decided = "Not decided"
    ship = "Ship it"
    no_export = "Nothing to ship"


@dataclass(frozen=True)
class Rate:
    """A paired comparison of one pass rate of the export with the reference's.

    Attributes:
        figure: name of the pass rate.
        prompts: number of prompts that were decided for both models.
        difference, low, high: difference of the pass rates, and its 95 % interval, as shares.
        verdict: outcome of the corrected test: BETTER, WORSE, or another text.
        reference: pass rate of the reference, as a share.
        judges_content: whether the pass rate depends on the content of the answers, and not on their form alone.
    """

    figure: str
    prompts: int
    difference: float
    low: float
    high: float
    verdict: str
    reference: float
    judges_content: bool = True


@dataclass(frozen=True)
class Rise:
    """A validation loss that is far above its value before (`training.symptoms.is_risen`).

    Attributes:
        cause: what raised the loss, such as "SFT".
        before, after: the losses.
    """

    cause: str
    before: float
    after: float


@dataclass(frozen=True)
class Evidence:
    """The facts about an export that the rule needs.

    Attributes:
        export: name of the export, such as "the MXFP4 export".
        reference: name of the model that it must match, such as "SFT", or None if no such model was evaluated.
        stands_for: name of the evaluated model whose answers count for the export, because it computes with the same
            expert weights. None if the export itself was evaluated.
        rates: comparisons of the pass rates.
        loss: validation loss of the export, or None.
        is_verified: whether `verify` has passed on the export's files.
        is_compared: whether this `verify` compared the export with the model that it was made from. Otherwise it
            compared with the base model alone, which finds gross errors, but not single wrong values.
        smaller: size of the reference when served, divided by the export's, or None if a size is unknown.
        left_open: pass rates of the reference -> (prompts on which the export's answer could not be judged, prompts on
            which the reference's could). A missing text cannot be judged, for example if the export stops reasoning.
        truncated: name of a model -> (answers that reached the limit of tokens, all its answers).
        rises: losses that training or rounding raised.
        measured_by: commands that make the missing measurements.
    """

    export: str
    reference: str | None
    stands_for: str | None
    rates: list[Rate]
    loss: float | None
    is_verified: bool
    smaller: float | None
    left_open: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    truncated: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    rises: Sequence[Rise] = ()
    is_compared: bool = True
    measured_by: str = "stage=evaluate eval=full"


@dataclass(frozen=True)
class Decision:
    """What to do with an export.

    Attributes:
        outcome: the outcome.
        headline: the outcome and its reasons, in one sentence.
    """

    outcome: Outcome
    headline: str


NO_EXPORT = Decision(Outcome.no_export, f"{Outcome.no_export.value}: there is no export. Run stage=export.")


def decide(evidence: Evidence, margin: float) -> Decision:
    """Apply the rule of this module.

    Args:
        evidence: the facts about the export.
        margin: the margin of non-inferiority, in points of a pass rate.
    """
    found = [*_worse(evidence), *_unverified(evidence), *_unmeasured(evidence)]
    found += [*_undecided(evidence, margin), *_uninformative(evidence, margin)]
    if not found:
        return Decision(Outcome.ship, f"{Outcome.ship.value}: {_praise(evidence, margin)}.")
    outcome = found[0][0]
    # A worse export needs no further reasons. All missing results are listed, so that they can be made at once.
    reasons = [reason for each, reason in found if outcome is not Outcome.do_not_ship or each is outcome]
    return Decision(outcome, f"{outcome.value}: {evidence.export} {', and '.join(reasons)}.")


def state_rule(margin: float) -> str:
    """State the rule for readers of the report. Each condition is a line."""
    return (
        "An export can be shipped if all four conditions hold:\n\n"
        "1. No pass rate is significantly worse than the reference's. The validation loss is finite, and neither a"
        f" training stage nor all steps together raised it by more than {100 * MOST_RISE:g} %.\n"
        "2. verify has passed on it.\n"
        "3. For each pass rate, the 95 % interval of the difference excludes a loss of"
        f" {margin:g} points or more (compare.margin).\n"
        f"4. The answers can show such a loss: the reference passes at least {LEAST_MARGINS * margin:g} % in each pass"
        " rate, a pass rate other than format health was measured, and at most"
        f" {100 * MOST_TRUNCATED:g} % of the answers of either model reached the limit of tokens.\n\n"
        f"Condition 3 needs at least {least_prompts(margin)} prompts, and more if the models differ on some. It also"
        f" needs answers that can be judged on all but {margin:g} % of these prompts. The reference is SFT, or the"
        " original without SFT. The tests are paired by prompt."
    )


def least_prompts(margin: float) -> int:
    """Return the smallest number of prompts on which identical answers exclude a loss of `margin` points."""
    low, high = 1, 1
    while not _excludes(high, margin):
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _excludes(middle, margin) else (middle + 1, high)
    return high


def _excludes(prompts: int, margin: float) -> bool:
    return difference_interval(0, 0, prompts).low > -margin / 100


def _worse(evidence: Evidence) -> Iterator[tuple[Outcome, str]]:
    if evidence.loss is not None and not math.isfinite(evidence.loss):
        yield Outcome.do_not_ship, f"does not work, because its validation loss is {evidence.loss}"
    risen = [
        f"{rise.cause} raised the validation loss from {rise.before:.3f} to {rise.after:.3f}" for rise in evidence.rises
    ]
    if risen:
        yield Outcome.do_not_ship, f"is worse than before, because {_list(risen)}"
    worse = [
        f"its {figure_name(rate.figure)} is {-100 * rate.difference:.1f} points lower ({_interval(rate)},"
        f" {rate.prompts} prompts)"
        for rate in evidence.rates
        if rate.verdict == WORSE
    ]
    if worse:
        yield Outcome.do_not_ship, f"is worse than {evidence.reference}, because {_list(worse)}"


def _unverified(evidence: Evidence) -> Iterator[tuple[Outcome, str]]:
    if not evidence.is_verified:
        yield Outcome.not_verified, "is not verified (run stage=verify)"


def _unmeasured(evidence: Evidence) -> Iterator[tuple[Outcome, str]]:
    if not evidence.rates:
        beside = evidence.reference or "the model before rounding"
        yield Outcome.not_measured, f"has no answers to compare with {beside} (run {evidence.measured_by})"


def _undecided(evidence: Evidence, margin: float) -> Iterator[tuple[Outcome, str]]:
    for figure, (missing, prompts) in evidence.left_open.items():
        if missing > prompts * margin / 100:
            yield (
                Outcome.not_decided,
                f"gave no answer that {figure_name(figure)} can judge on {missing} of the {prompts} prompts where"
                f" {evidence.reference} did",
            )
    wide = [rate for rate in evidence.rates if rate.low <= -margin / 100]
    if wide:
        rate = min(wide, key=lambda each: each.low)
        yield (
            Outcome.not_decided,
            f"was measured on too few prompts to tell ({rate.prompts}): {figure_name(rate.figure)} may be up to"
            f" {-100 * rate.low:.1f} points worse than {evidence.reference}, and the margin is {margin:g}",
        )


def _uninformative(evidence: Evidence, margin: float) -> Iterator[tuple[Outcome, str]]:
    """Yield the reasons why equal answers of the two models do not show that the export is good."""
    for model, (truncated, answers) in evidence.truncated.items():
        if truncated > answers * MOST_TRUNCATED:
            yield (
                Outcome.not_decided,
                f"cannot be judged by truncated answers ({truncated} of the {answers} answers of {model} reached the"
                " limit of tokens: raise evaluate.generation.max_new_tokens)",
            )
    low = [
        f"{figure_name(rate.figure)} ({100 * rate.reference:.1f} %)"
        for rate in evidence.rates
        if rate.reference < LEAST_MARGINS * margin / 100
    ]
    if low:
        yield (
            Outcome.not_decided,
            f"has too weak a reference: {evidence.reference} itself passes less than {LEAST_MARGINS * margin:g} % of"
            f" the prompts in {_list(low)}, so equal rates show nothing",
        )
    if evidence.rates and not any(rate.judges_content for rate in evidence.rates):
        yield (
            Outcome.not_decided,
            f"was measured in {_list([figure_name(rate.figure) for rate in evidence.rates])} alone, which does not"
            " judge the content of the answers (give the prompts expected answers, languages or safety)",
        )


def _praise(evidence: Evidence, margin: float) -> str:
    better = [figure_name(rate.figure) for rate in evidence.rates if rate.verdict == BETTER]
    equal = [figure_name(rate.figure) for rate in evidence.rates if rate.verdict != BETTER]
    parts = [f"better than {evidence.reference} in {_list(better)}"] if better else []
    parts += [f"as good as {evidence.reference} within {margin:g} points in {_list(equal)}"] if equal else []
    prompts = {rate.prompts for rate in evidence.rates}
    count = f"{min(prompts)} prompts" if len(prompts) == 1 else f"{min(prompts)} to {max(prompts)} prompts"
    measured = f", measured as {evidence.stands_for}" if evidence.stands_for else ""
    return f"{evidence.export} is {' and '.join(parts)} on {count}{measured}{_size(evidence)}, {_verified(evidence)}"


def _verified(evidence: Evidence) -> str:
    return "verified" if evidence.is_compared else "verified against the base model alone, not the trained model"


def _size(evidence: Evidence) -> str:
    if evidence.smaller is None:
        return ""
    ratio = f"{evidence.smaller:.1f}" if evidence.smaller >= 1 else f"{1 / evidence.smaller:.1f}"
    if ratio == "1.0":
        return f", as large as {evidence.reference}"
    return f", {ratio} × {'smaller' if evidence.smaller > 1 else 'larger'}"


def _interval(rate: Rate) -> str:
    return f"95 % interval {100 * rate.low:+.1f} to {100 * rate.high:+.1f}"


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
