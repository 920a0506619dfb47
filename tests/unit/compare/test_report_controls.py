"""The report compares QAT with the best control, and says so if a control does better."""

import json
from pathlib import Path

import evaluated
import pytest
from test_report_findings import LOW, SFT, report, sentences, verdicts

from pipeline.compare import content, evidence
from pipeline.compare.content import Content
from pipeline.errors import UserError
from pipeline.evaluate.statistics import BETTER, WORSE

MORE, STOCHASTIC, PARTS = "controls/more_sft/quantize", "controls/stochastic/quantize", "controls/bf16_parts/sft"
LOSSES = {"sft": 2.0, "quantize": 2.2, "qat": 2.05, MORE: 1.9, STOCHASTIC: 2.02, PARTS: 2.3}


def figures_of(losses: dict[str, float]) -> dict[str, dict[str, float]]:
    return {model: {"validation_loss": loss, "kl_divergence": loss / 100} for model, loss in losses.items()}


def run_with(directory: Path, losses: dict[str, float], passed: dict[str, list[bool]] | None = None) -> Path:
    """Make an evaluated run with controls. QAT and more SFT have 6 steps."""
    evaluated.run(directory, passed, figures=figures_of(losses))
    steps = {"details": {"steps": 6}}
    evaluated.record(directory / "qat", parents={"quantize": "quantize"}, fake_quantized="mxfp4", **steps)
    evaluated.record(directory / "controls" / "more_sft" / "sft", **steps)
    for model in (MORE, STOCHASTIC):
        facts = {"fingerprint": model, "parents": {"sft": "sft"}, "fake_quantized": "mxfp4"}
        evaluated.record(directory / model, **facts, details={"method": "stochastic"})
    evaluated.record(directory / PARTS, fingerprint=PARTS, kind="packed", format="mxfp4")
    return directory


def verdict(found: Content) -> str:
    (sentence,) = [line for line in sentences(found).splitlines() if line.startswith("Verdict")]
    return sentence


def test_a_control_that_beats_qat_is_named_with_the_way_to_export_it(tmp_path: Path) -> None:
    found = report(run_with(tmp_path / "run", LOSSES))
    assert verdict(found) == (
        "Verdict: SFT + more SFT + PTQ (stochastic) does better than QAT: validation loss 1.9000 against 2.0500, KL"
        f" divergence from SFT 0.0190 against 0.0205. To export it, set export.source={MORE}."
    )
    assert "The best of 4 controls was chosen by its loss on the same data" in sentences(found)
    assert verdict(found) in content.to_markdown(found)


def test_qat_that_beats_every_control_is_compared_with_the_best_of_them(tmp_path: Path) -> None:
    found = report(run_with(tmp_path / "run", {**LOSSES, "qat": 1.8}))
    assert "the best control, SFT + more SFT + PTQ (stochastic), does not do better than QAT" in verdict(found)
    assert "export.source" not in verdict(found)


def test_equal_losses_are_not_called_better(tmp_path: Path) -> None:
    for number, loss in enumerate((1.9, 1.90001, 1.89999)):
        assert "does as well as QAT" in verdict(report(run_with(tmp_path / f"run{number}", {**LOSSES, "qat": loss})))


def test_the_runs_own_ptq_is_a_control_too(tmp_path: Path) -> None:
    found = report(run_with(tmp_path / "run", {**LOSSES, "quantize": 1.5}))
    assert verdict(found).startswith("Verdict: SFT + PTQ does better than QAT: validation loss 1.5000")
    assert verdict(found).endswith("export.source=quantize.")


def test_without_controls_the_comparison_with_ptq_is_said_to_overstate_qat(tmp_path: Path) -> None:
    losses = {model: loss for model, loss in LOSSES.items() if "/" not in model}
    text = sentences(report(evaluated.run(tmp_path / "run", figures=figures_of(losses))))
    assert "Without controls, the comparison with PTQ overstates QAT" in text and "controls=true" in text
    assert "Verdict" not in text


def test_a_control_without_more_training_leaves_the_cause_open(tmp_path: Path) -> None:
    run_dir = run_with(tmp_path / "run", {model: loss for model, loss in LOSSES.items() if model != MORE})
    assert "more_sft was not evaluated, so QAT may owe its loss to more training." in sentences(report(run_dir))


def test_a_control_with_other_steps_than_qat_is_reported(tmp_path: Path) -> None:
    run_dir = run_with(tmp_path / "run", LOSSES)
    evaluated.record(run_dir / "controls" / "more_sft" / "sft", details={"steps": 3})
    assert "QAT had 6 steps, but SFT + more SFT + PTQ (stochastic) had 3." in sentences(report(run_dir))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "Early stopping ended QAT after 6 steps, and SFT + more SFT + PTQ (stochastic) after 3."),
        ({"max_steps": 3}, "were set to other steps: max_steps=9 against 3. Make the control again."),
    ],
)
def test_early_stopping_is_told_from_other_settings_of_the_steps(
    changed: dict[str, int], said: str, tmp_path: Path
) -> None:
    run_dir, asked = run_with(tmp_path / "run", LOSSES), {"max_steps": 9, "epochs": 1.0, "early_stopping_patience": 2}
    settings = {f"qat.{name}": value for name, value in asked.items()}
    facts = {"parents": {"quantize": "quantize"}, "fake_quantized": "mxfp4"}
    evaluated.record(run_dir / "qat", settings=settings, details={"steps": 6}, **facts)
    own = {f"sft.{name}": value for name, value in {**asked, "epochs": 2.0, **changed}.items()}
    evaluated.record(run_dir / "controls" / "more_sft" / "sft", settings=own, details={"steps": 3})
    found = sentences(report(run_dir))
    assert said in found and ("Make the control again" in found) == bool(changed)


def test_a_model_that_is_not_rounded_is_no_rival_of_qat(tmp_path: Path) -> None:
    unrounded = "controls/more_sft/sft"
    run_dir = run_with(tmp_path / "run", {**LOSSES, unrounded: 1.0})
    evaluated.record(run_dir / unrounded, fingerprint=unrounded, details={"steps": 6})
    found = report(run_dir)
    assert verdict(found).startswith("Verdict: SFT + more SFT + PTQ (stochastic) does better")
    assert {row.role for row in found.rows if row.model == unrounded} == {"SFT + more SFT"}
    assert "The best of 4 controls" in sentences(found)


def test_a_control_in_another_format_is_no_rival_of_qat(tmp_path: Path) -> None:
    run_dir = run_with(tmp_path / "run", LOSSES)
    facts = {"fingerprint": MORE, "parents": {"sft": "sft"}, "details": {"method": "stochastic"}}
    evaluated.record(run_dir / MORE, fake_quantized="nvfp4", **facts)
    assert verdict(report(run_dir)).startswith("Verdict: SFT + PTQ (stochastic) does better than QAT")


def test_runs_that_share_a_control_are_both_compared_with_it(tmp_path: Path) -> None:
    first = run_with(tmp_path / "first", LOSSES)
    second = run_with(tmp_path / "second", {**LOSSES, "qat": 1.8})
    evaluated.record(second / "qat", fingerprint="other", parents={"quantize": "quantize"}, fake_quantized="mxfp4")
    path = second / "evaluate" / "artifact.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "parents": {**record["parents"], "qat": "other"}}))
    chains = evidence.find_chains(list(report(first, second).rows))
    found = {chain.qat.title: chain.best_control for chain in chains if chain.qat is not None}
    assert found.keys() == {"first: QAT", "second: QAT"}
    assert {best.model for best in found.values() if best is not None} == {MORE} and None not in found.values()


def test_answers_of_qat_are_tested_against_those_of_the_best_control_alone(tmp_path: Path) -> None:
    passed = {"sft": SFT, "quantize": LOW, "qat": LOW, MORE: SFT, STOCHASTIC: LOW}
    found = report(run_with(tmp_path / "run", LOSSES, passed))
    assert verdicts(found)[("qat", MORE)] == WORSE and ("qat", STOCHASTIC) not in verdicts(found)
    assert (
        "Exact match: the best control is better than QAT. QAT against Control: SFT + more SFT + PTQ (stochastic)"
        in sentences(found)
    )
    better = report(run_with(tmp_path / "other", LOSSES, {**passed, "qat": SFT, MORE: LOW}))
    assert verdicts(better)[("qat", MORE)] == BETTER
    assert "Exact match: QAT is better than the best control." in sentences(better)


def test_rows_of_controls_say_what_they_are_and_are_held_against_sft(tmp_path: Path) -> None:
    rows = {row.model: row for row in report(run_with(tmp_path / "run", LOSSES)).rows}
    assert rows[STOCHASTIC].role == "SFT + PTQ (stochastic)" and rows[PARTS].role == "BF16 parts"
    assert rows[PARTS].figures["loss_change"] == LOSSES[PARTS] / LOSSES["sft"] - 1
    assert rows[MORE].seconds == 20.0 and rows[STOCHASTIC].seconds == 10.0  # more SFT has two stages
    assert rows[PARTS].block_format == "mxfp4"


def test_a_control_that_was_rebuilt_after_its_evaluation_is_refused(tmp_path: Path) -> None:
    run_dir = run_with(tmp_path / "run", LOSSES)
    evaluated.record(run_dir / MORE, fingerprint="another")
    with pytest.raises(UserError, match="was rebuilt after it was evaluated"):
        report(run_dir)
