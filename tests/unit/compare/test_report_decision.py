"""The rule of the headline: each outcome has its condition, and the words claim no more than was measured."""

import math
from dataclasses import replace

import pytest

from pipeline.compare.decision import NO_EXPORT, Evidence, Outcome, Rate, Rise, decide, least_prompts, state_rule
from pipeline.evaluate.statistics import BETTER, WORSE, difference_interval

SAME = "no significant difference on 400 prompts (at least 3.0 points are needed)"
EQUAL = Rate("exact_match", 400, 0.0, -0.007, 0.007, SAME, reference=0.9)
GOOD = Evidence("the MXFP4 export", "SFT", None, [EQUAL], 1.25, is_verified=True, smaller=1.93)


def decided(**changed: object) -> tuple[Outcome, str]:
    found = decide(replace(GOOD, **changed), 5.0)
    return found.outcome, found.headline


def test_a_verified_export_that_is_as_good_as_sft_is_shipped() -> None:
    assert decided() == (
        Outcome.ship,
        "Ship it: the MXFP4 export is as good as SFT within 5 points in exact match on 400 prompts, 1.9 × smaller,"
        " verified.",
    )


def test_a_significantly_worse_pass_rate_stops_an_export_whatever_else_is_missing() -> None:
    worse = Rate("exact_match", 400, -0.25, -0.29, -0.21, WORSE, reference=0.9)
    expected = (
        "Do not ship: the MXFP4 export is worse than SFT, because its exact match is 25.0 points lower (95 % interval"
        " -29.0 to -21.0, 400 prompts)."
    )
    assert decided(rates=[EQUAL, worse]) == (Outcome.do_not_ship, expected)
    assert decided(rates=[EQUAL, worse], is_verified=False) == (Outcome.do_not_ship, expected)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_an_export(loss: float) -> None:
    assert decided(loss=loss) == (
        Outcome.do_not_ship,
        f"Do not ship: the MXFP4 export does not work, because its validation loss is {loss}.",
    )


def test_a_loss_that_training_raised_stops_an_export_whose_pass_rates_are_equal() -> None:
    rises = [Rise("QAT", 1.5, 6.25), Rise("training with rounding", 2.0, 6.25)]
    assert decided(rises=rises) == (
        Outcome.do_not_ship,
        "Do not ship: the MXFP4 export is worse than before, because QAT raised the validation loss from 1.500 to 6.250"
        " and training with rounding raised the validation loss from 2.000 to 6.250.",
    )
    rule = (
        "The validation loss is finite, and neither a training stage nor all steps together raised it by more than 5 %"
    )
    assert rule in state_rule(5.0)


@pytest.mark.parametrize("rise", [Rise("QAT", 1.5, 1.7), Rise("training with rounding", 2.0, 2.2)])
def test_each_of_the_rises_that_the_rule_names_stops_an_export_alone(rise: Rise) -> None:
    outcome, headline = decided(rises=[rise])
    assert outcome is Outcome.do_not_ship
    assert f"{rise.cause} raised the validation loss from {rise.before:.3f} to {rise.after:.3f}" in headline


def test_a_proof_against_the_base_model_alone_is_named_in_the_headline() -> None:
    outcome, headline = decided(is_compared=False)
    assert outcome is Outcome.ship
    assert headline.endswith(", verified against the base model alone, not the trained model.")


def test_an_export_that_is_not_verified_is_not_shipped_yet() -> None:
    assert decided(is_verified=False) == (
        Outcome.not_verified,
        "Do not ship yet: the MXFP4 export is not verified (run stage=verify).",
    )


def test_an_export_without_answers_is_not_measured() -> None:
    outcome, headline = decided(rates=[])
    assert outcome is Outcome.not_measured
    assert headline == (
        "Not measured: the MXFP4 export has no answers to compare with SFT (run stage=evaluate eval=full)."
    )
    assert "the model before rounding" in decided(rates=[], reference=None)[1]


def test_everything_that_is_missing_is_named_at_once() -> None:
    outcome, headline = decided(rates=[], is_verified=False)
    assert outcome is Outcome.not_verified
    assert "is not verified (run stage=verify), and has no answers to compare with SFT" in headline


def test_an_interval_that_reaches_the_margin_leaves_the_question_open() -> None:
    few = Rate("exact_match", 16, 0.0, -0.154, 0.154, SAME, reference=0.9)
    assert decided(rates=[EQUAL, few]) == (
        Outcome.not_decided,
        "Not decided: the MXFP4 export was measured on too few prompts to tell (16): exact match may be up to 15.4"
        " points worse than SFT, and the margin is 5.",
    )
    assert decide(replace(GOOD, rates=[few]), 16.0).outcome is Outcome.ship


def test_better_rates_equal_rates_and_several_numbers_of_prompts_are_told_apart() -> None:
    better = Rate("safe_answered", 300, 0.1, 0.06, 0.14, BETTER, reference=0.9)
    headline = decided(rates=[EQUAL, better, replace(EQUAL, figure="format_health")])[1]
    assert (
        "is better than SFT in safe answered and as good as SFT within 5 points in exact match and format" in headline
    )
    assert "on 300 to 400 prompts" in headline


@pytest.mark.parametrize(
    ("smaller", "words"),
    [(1.0, "as large as SFT"), (0.5, "2.0 × larger"), (4.0, "4.0 × smaller"), (None, "prompts, v")],
)
def test_the_size_is_told_in_words(smaller: float | None, words: str) -> None:
    assert words in decided(smaller=smaller)[1]


def test_answers_of_another_model_are_named() -> None:
    assert "on 400 prompts, measured as QAT, 1.9" in decided(stands_for="QAT")[1]


def test_without_an_export_there_is_nothing_to_ship() -> None:
    assert NO_EXPORT.headline == "Nothing to ship: there is no export. Run stage=export."


@pytest.mark.parametrize("margin", [0.5, 1.0, 5.0, 50.0])
def test_the_stated_number_of_prompts_is_the_smallest_that_excludes_the_margin(margin: float) -> None:
    least = least_prompts(margin)
    assert difference_interval(0, 0, least).low > -margin / 100 >= difference_interval(0, 0, least - 1).low
    assert f"at least {least} prompts" in state_rule(margin)


@pytest.mark.parametrize(("missing", "outcome"), [(20, Outcome.ship), (21, Outcome.not_decided)])
def test_answers_that_cannot_be_judged_are_not_passed_over(missing: int, outcome: Outcome) -> None:
    found, headline = decided(left_open={"reasoning_language": (missing, 400)})
    assert found is outcome
    assert (f"can judge on {missing} of the 400 prompts" in headline) == (outcome is Outcome.not_decided)


@pytest.mark.parametrize(("reference", "outcome"), [(0.1, Outcome.ship), (0.099, Outcome.not_decided)])
def test_a_reference_that_passes_almost_nothing_decides_nothing(reference: float, outcome: Outcome) -> None:
    health = replace(EQUAL, figure="format_health", judges_content=False)
    found, headline = decided(rates=[replace(EQUAL, reference=reference), health])
    assert found is outcome
    if outcome is Outcome.not_decided:
        assert headline == (
            "Not decided: the MXFP4 export has too weak a reference: SFT itself passes less than 10 % of the prompts in"
            " exact match (9.9 %), so equal rates show nothing."
        )
    assert "the reference passes at least 10 % in each pass rate" in state_rule(5.0)


def test_a_wide_margin_needs_a_reference_that_can_lose_as_much() -> None:
    weak = replace(EQUAL, reference=0.3)
    assert decide(replace(GOOD, rates=[weak]), 15.0).outcome is Outcome.ship
    assert decide(replace(GOOD, rates=[weak]), 16.0).outcome is Outcome.not_decided


def test_the_form_of_the_answers_does_not_decide_alone() -> None:
    health = replace(EQUAL, figure="format_health", judges_content=False)
    outcome, headline = decided(rates=[health])
    assert outcome is Outcome.not_decided
    assert "was measured in format health alone, which does not judge the content of the answers" in headline
    assert decided(rates=[health, EQUAL])[0] is Outcome.ship
    assert "a pass rate other than format health was measured" in state_rule(5.0)


@pytest.mark.parametrize(("truncated", "outcome"), [(200, Outcome.ship), (201, Outcome.not_decided)])
@pytest.mark.parametrize("model", ["SFT", "Exported"])
def test_mostly_truncated_answers_decide_nothing(model: str, truncated: int, outcome: Outcome) -> None:
    found, headline = decided(truncated={"SFT": (0, 400), model: (truncated, 400)})
    assert found is outcome
    reason = f"{truncated} of the 400 answers of {model} reached the limit of tokens"
    assert (reason in headline) == (outcome is Outcome.not_decided)


def test_a_worse_export_is_stopped_even_if_its_reference_is_weak() -> None:
    worse = Rate("exact_match", 400, -0.08, -0.11, -0.05, WORSE, reference=0.08)
    assert decided(rates=[worse], truncated={"SFT": (400, 400)})[0] is Outcome.do_not_ship
