"""A report contains the right sentences. The tests make runs whose results determine which sentences are right."""

from pathlib import Path

import evaluated
import pytest
from evaluated import RIGHT, WRONG, answer

from pipeline.compare import content, runs
from pipeline.compare.content import Content
from pipeline.evaluate.statistics import BETTER, WORSE, mcnemar

SFT, LOW = [True] * 95 + [False] * 5, [True] * 70 + [False] * 30


def report(*directories: Path) -> Content:
    return content.collect(runs.find([str(directory) for directory in directories]), 5)


def sentences(found: Content) -> str:
    return "\n".join(sentence for finding in found.findings for sentence in finding.sentences)


def verdicts(found: Content, figure: str = "exact_match") -> dict[tuple[str, str], str]:
    return {(test.model.model, test.reference.model): test.verdict for test in found.tests if test.figure == figure}


def test_loss_from_ptq_and_recovery_by_qat_are_reported_with_their_evidence(tmp_path: Path) -> None:
    found = report(evaluated.run(tmp_path / "run", {"sft": SFT, "quantize": LOW, "qat": SFT}))
    assert verdicts(found)[("quantize", "sft")] == WORSE
    assert verdicts(found)[("qat", "quantize")] == BETTER
    text = sentences(found)
    assert "Exact match: PTQ is worse than SFT. PTQ against SFT: -25.0 points (95 % interval" in text
    assert "Exact match: QAT recovered 100 % of the loss from PTQ. QAT against PTQ: +25.0 points" in text
    assert "Exact match: the test shows no gap between QAT and SFT." in text
    assert "100 prompts" in text


def test_an_insignificant_difference_claims_no_effect_and_names_the_detectable_one(tmp_path: Path) -> None:
    almost = [False] * 2 + SFT[2:]
    found = report(evaluated.run(tmp_path / "run", {"sft": SFT, "quantize": almost, "qat": SFT}))
    assert not {WORSE, BETTER} & set(verdicts(found).values())
    text = sentences(found)
    assert "Exact match: the test shows no effect of PTQ. PTQ against SFT: -2.0 points" in text
    assert "no significant difference; at least " in text
    assert all(test.cells()[-1].endswith("points are needed") for test in found.tests)
    assert not [word for word in ("lost", "worse", "better", "recovered") if word in text]


def test_qat_that_is_worse_than_ptq_is_reported_as_worse(tmp_path: Path) -> None:
    found = report(evaluated.run(tmp_path / "run", {"sft": SFT, "quantize": SFT, "qat": LOW}))
    text = sentences(found)
    assert "Exact match: QAT is worse than PTQ." in text
    assert "Exact match: QAT did not fully recover to SFT." in text


def test_a_gain_without_a_loss_is_not_reported_as_recovery(tmp_path: Path) -> None:
    found = report(evaluated.run(tmp_path / "run", {"sft": LOW, "quantize": LOW, "qat": SFT}))
    text = sentences(found)
    assert "QAT is better than PTQ" in text and "QAT is better than SFT" in text
    assert "recovered" not in text


def test_a_missing_sft_is_reported_and_the_rest_is_compared(tmp_path: Path) -> None:
    found = report(evaluated.run(tmp_path / "run", {"quantize": LOW, "qat": SFT}))
    assert "Not evaluated: sft" in sentences(found)
    assert list(verdicts(found)) == [("qat", "quantize")]
    assert "QAT is better than PTQ" in sentences(found)


def test_models_without_common_prompts_are_not_tested(tmp_path: Path) -> None:
    answers = {"sft": [answer(0, RIGHT)], "quantize": [answer(1, WRONG)]}
    found = report(evaluated.run(tmp_path / "run", answers=answers))
    assert verdicts(found) == {("quantize", "sft"): "no prompt was decided for both models"}
    assert "not tested. PTQ against SFT: no prompt was decided for both models." in sentences(found)


def test_models_without_answers_are_not_tested(tmp_path: Path) -> None:
    found = report(evaluated.run(tmp_path / "run", {"sft": [], "quantize": []}))
    assert found.tests == []
    assert "No answers were compared" in sentences(found)


def test_losses_are_reported_with_their_number_of_tokens_and_without_a_test(tmp_path: Path) -> None:
    losses = {"sft": 2.0, "quantize": 2.2, "qat": 2.05}
    figures = {model: {"validation_loss": loss, "supervised_tokens": 940} for model, loss in losses.items()}
    text = sentences(report(evaluated.run(tmp_path / "run", figures=figures)))
    assert "PTQ changed it by +10.00 % (2.0000 to 2.2000, 940 supervised tokens, no interval" in text
    assert "QAT changed PTQ's loss by -6.82 % (2.2000 to 2.0500; recovers 75 % of PTQ's increase)" in text
    assert "SFT + QAT differs by +2.50 % from SFT. This difference remains after QAT." in text
    assert "no difference was tested" in text


def test_a_lower_loss_of_qat_than_of_sft_is_attributed_to_more_training(tmp_path: Path) -> None:
    figures = {model: {"validation_loss": loss} for model, loss in {"sft": 2.0, "quantize": 2.2, "qat": 1.9}.items()}
    assert "which alone may explain the lower loss" in sentences(
        report(evaluated.run(tmp_path / "run", figures=figures))
    )


def test_a_run_with_only_the_original_has_nothing_to_compare(tmp_path: Path) -> None:
    found = report(evaluated.run(tmp_path / "run", figures={"upcast": {"validation_loss": 7.0}}))
    assert [finding.title for finding in found.findings] == ["Nothing to compare"]


def test_p_values_are_corrected_for_all_tests_of_the_report(tmp_path: Path) -> None:
    from statsmodels.stats import multitest

    found = report(evaluated.run(tmp_path / "run", {"sft": SFT, "quantize": LOW, "qat": SFT[5:] + [True] * 5}))
    compared = [(test.comparison, test.p_value) for test in found.tests]
    raw = [mcnemar(each.wins, each.losses) for each, _ in compared if each is not None]
    assert len(raw) == len(compared) == 6  # exact match and well-formedness, for three pairs of models
    assert [p_value for _, p_value in compared] == pytest.approx(multitest.multipletests(raw, method="holm")[1])


def test_one_of_several_answers_to_a_prompt_is_tested(tmp_path: Path) -> None:
    sft = [answer(i, RIGHT, sample=sample) for i in range(10) for sample in range(3)]
    ptq = [answer(i, WRONG, sample=sample) for i in range(10) for sample in range(3)]
    found = report(evaluated.run(tmp_path / "run", answers={"sft": sft, "quantize": ptq}))
    (comparison,) = (test.comparison for test in found.tests if test.figure == "exact_match")
    assert comparison is not None and comparison.prompts == comparison.losses == 10


def test_formats_are_compared_by_their_best_qat_on_the_same_prompts(tmp_path: Path) -> None:
    base = {"sft": "sft", "quantize": "q4"}
    loss = {"mxfp4": 2.0, "worse": 2.1, "nvfp4": 1.9}
    directories = [
        evaluated.run(
            tmp_path / name,
            {"qat": SFT},
            {"qat": {"validation_loss": loss[name]}},
            block_format="nvfp4" if name == "nvfp4" else "mxfp4",
            fingerprints={**base, "qat": name},
        )
        for name in loss
    ]
    (finding,) = (each for each in report(*directories).findings if " against " in each.title)
    text = " ".join(finding.sentences)
    assert finding.title == "nvfp4 against mxfp4"
    assert "nvfp4: QAT (nvfp4) and mxfp4: QAT (mxfp4). The first model's validation loss differs by -5.00 %" in text
    assert "chosen by this loss on the same data" in text
    assert "nvfp4: QAT against mxfp4: QAT: +0.0 points" in text


def test_qat_of_a_sweep_is_compared_with_the_sft_that_another_run_evaluated(tmp_path: Path) -> None:
    base = evaluated.run(tmp_path / "base", {"sft": SFT, "quantize": LOW})
    job = evaluated.run(tmp_path / "job", {"qat": SFT})
    evaluated.record(job / "quantize", fingerprint="quantize", parents={"sft": "sft"})
    found = report(base, job)
    assert {(test.model.title, test.reference.title) for test in found.tests} == {
        ("base: PTQ", "base: SFT"),
        ("job: QAT", "base: PTQ"),
        ("job: QAT", "base: SFT"),
    }


@pytest.mark.parametrize("models", [("sft", "quantize", "qat"), ("sft",)])
def test_trained_bf16_parts_need_no_rounding_unless_they_are_rounded_to_another_format(
    models: tuple[str, ...], tmp_path: Path
) -> None:
    figures = {model: {"validation_loss": 2.0} for model in models}
    run_dir = evaluated.run(tmp_path / "run", figures=figures, block_format="nvfp4")
    evaluated.record(run_dir / "sft", kind="packed", format="mxfp4", parents={"upcast": "upcast"})
    found = report(run_dir)
    is_rounded = "qat" in models
    assert ("needs neither PTQ nor QAT" in sentences(found)) != is_rounded
    assert ("in nvfp4. SFT takes" in sentences(found)) == is_rounded and "in BF16" not in sentences(found)
