"""What a report says of runs whose outcome is known: made by hand, so that each sentence has a right answer."""

from pathlib import Path

import evaluated
import pytest
from evaluated import RIGHT, WRONG, answer

from pipeline.compare import content, runs
from pipeline.compare.content import Content
from pipeline.evaluate.statistics import BETTER, WORSE, mcnemar

SFT, LOW = [True] * 95 + [False] * 5, [True] * 70 + [False] * 30


def report(*directories: Path) -> Content:
    return content.of(runs.find([str(directory) for directory in directories]), 5)


def sentences(found: Content) -> str:
    return "\n".join(sentence for finding in found.findings for sentence in finding.sentences)


def verdicts(found: Content, figure: str = "exact_match") -> dict[tuple[str, str], str]:
    return {(test.model.model, test.reference.model): test.verdict for test in found.tests if test.figure == figure}


def test_what_ptq_lost_and_qat_recovered_is_said_with_its_evidence(tmp_path: Path) -> None:
    found = report(evaluated.run(tmp_path / "run", {"sft": SFT, "quantize": LOW, "qat": SFT}))
    assert verdicts(found)[("quantize", "sft")] == WORSE
    assert verdicts(found)[("qat", "quantize")] == BETTER
    told = sentences(found)
    assert "Exact match: PTQ lost. quantize against sft: -25.0 points (95 % interval" in told
    assert "Exact match: QAT recovered 100 % of what PTQ had lost. qat against quantize: +25.0 points" in told
    assert "Exact match: that QAT ended elsewhere than SFT is not shown." in told
    assert "100 prompts" in told


def test_no_difference_is_never_called_one_and_says_what_could_have_been_seen(tmp_path: Path) -> None:
    almost = [False] * 2 + SFT[2:]
    found = report(evaluated.run(tmp_path / "run", {"sft": SFT, "quantize": almost, "qat": SFT}))
    assert not {WORSE, BETTER} & set(verdicts(found).values())
    told = sentences(found)
    assert "Exact match: that PTQ changed it is not shown. quantize against sft: -2.0 points" in told
    assert "no difference that the data carry; it would have to be " in told
    assert "lost" not in told and "recovered" not in told


def test_a_qat_that_is_worse_than_ptq_is_called_so(tmp_path: Path) -> None:
    found = report(evaluated.run(tmp_path / "run", {"sft": SFT, "quantize": SFT, "qat": LOW}))
    told = sentences(found)
    assert "Exact match: QAT is worse than PTQ." in told
    assert "Exact match: QAT did not win back all of SFT." in told


def test_a_gain_without_a_loss_is_not_called_recovery(tmp_path: Path) -> None:
    found = report(evaluated.run(tmp_path / "run", {"sft": LOW, "quantize": LOW, "qat": SFT}))
    told = sentences(found)
    assert "QAT gained over PTQ" in told and "QAT ended above SFT" in told
    assert "recovered" not in told


def test_without_sft_only_what_is_known_is_told(tmp_path: Path) -> None:
    found = report(evaluated.run(tmp_path / "run", {"quantize": LOW, "qat": SFT}))
    assert "Not evaluated: sft" in sentences(found)
    assert list(verdicts(found)) == [("qat", "quantize")]
    assert "QAT gained over PTQ" in sentences(found)


def test_no_common_prompts_are_no_test(tmp_path: Path) -> None:
    answers = {"sft": [answer(0, RIGHT)], "quantize": [answer(1, WRONG)]}
    found = report(evaluated.run(tmp_path / "run", answers=answers))
    assert verdicts(found) == {("quantize", "sft"): "no prompt could be decided for both"}
    assert "quantize against sft: no prompt could be decided for both." in sentences(found)


def test_zero_answers_are_no_test_either(tmp_path: Path) -> None:
    found = report(evaluated.run(tmp_path / "run", {"sft": [], "quantize": []}))
    assert found.tests == []
    assert "No answers were compared" in sentences(found)


def test_losses_are_told_with_what_they_rest_on_and_without_a_test(tmp_path: Path) -> None:
    losses = {"sft": 2.0, "quantize": 2.2, "qat": 2.05}
    figures = {model: {"validation_loss": loss, "supervised_tokens": 940} for model, loss in losses.items()}
    told = sentences(report(evaluated.run(tmp_path / "run", figures=figures)))
    assert "PTQ changed it by +10.00 % (2.0000 to 2.2000, 940 supervised tokens, no interval" in told
    assert "QAT changed it by -6.82 % from PTQ (2.2000 to 2.0500: 75 % of what PTQ had cost)" in told
    assert "SFT + QAT is +2.50 % from SFT. That is what is left." in told
    assert "nothing here has been tested" in told


def test_a_qat_below_sft_is_put_down_to_more_training_too(tmp_path: Path) -> None:
    figures = {model: {"validation_loss": loss} for model, loss in {"sft": 2.0, "quantize": 2.2, "qat": 1.9}.items()}
    assert "which alone may explain that it is lower" in sentences(
        report(evaluated.run(tmp_path / "run", figures=figures))
    )


def test_only_the_original_is_nothing_to_compare(tmp_path: Path) -> None:
    found = report(evaluated.run(tmp_path / "run", figures={"upcast": {"validation_loss": 7.0}}))
    assert [finding.title for finding in found.findings] == ["Nothing to compare"]


def test_p_values_are_corrected_for_all_tests_of_the_report(tmp_path: Path) -> None:
    from statsmodels.stats import multitest

    found = report(evaluated.run(tmp_path / "run", {"sft": SFT, "quantize": LOW, "qat": SFT[5:] + [True] * 5}))
    compared = [(test.comparison, test.p_value) for test in found.tests]
    raw = [mcnemar(each.wins, each.losses) for each, _ in compared if each is not None]
    assert len(raw) == len(compared) == 6  # two figures (answers are all sound), three pairs
    assert [p_value for _, p_value in compared] == pytest.approx(multitest.multipletests(raw, method="holm")[1])


def test_of_several_answers_to_a_prompt_one_is_tested(tmp_path: Path) -> None:
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
    told = " ".join(finding.sentences)
    assert finding.title == "nvfp4 against mxfp4"
    assert "nvfp4/qat (nvfp4) and mxfp4/qat (mxfp4): -5.00 % validation loss" in told
    assert "chosen by that loss, on the same data" in told
    assert "nvfp4/qat against mxfp4/qat: +0.0 points" in told


def test_a_sweeps_qat_is_held_against_the_sft_that_another_run_evaluated(tmp_path: Path) -> None:
    base = evaluated.run(tmp_path / "base", {"sft": SFT, "quantize": LOW})
    job = evaluated.run(tmp_path / "job", {"qat": SFT})
    evaluated.record(job / "quantize", fingerprint="quantize", parents={"sft": "sft"})
    found = report(base, job)
    assert {(test.model.title, test.reference.title) for test in found.tests} == {
        ("base/quantize", "base/sft"),
        ("job/qat", "base/quantize"),
        ("job/qat", "base/sft"),
    }
