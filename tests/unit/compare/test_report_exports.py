"""The report on an export: which answers, which proof and which size belong to it, and that it is one with its twin."""

import json
from pathlib import Path
from typing import Any

import evaluated
import pytest

from pipeline.compare import content, page, plots, runs
from pipeline.compare.content import Content
from pipeline.compare.decision import Outcome
from pipeline.compare.exports import Verdict
from pipeline.errors import UserError
from pipeline.stages.compare import list_not_evaluated

ALL, MOST = [True] * 400, [True] * 300 + [False] * 100
LOSSES = {"sft": 2.0, "quantize": 2.2, "qat": 2.05, "export": 2.06}
CONTROL = "controls/stochastic/quantize"


def run_with_export(
    directory: Path, models: tuple[str, ...] = tuple(LOSSES), answers: bool = True, **export: object
) -> Path:
    """Make an evaluated run with an export of QAT that has passed `verify`."""
    figures = {model: {"validation_loss": LOSSES.get(model, 2.1)} for model in models}
    passed = {model: MOST if model == "quantize" else ALL for model in models}
    fingerprints = {"export": str(export.get("fingerprint", "export"))}
    evaluated.run(directory, passed if answers else None, figures, fingerprints=fingerprints)
    evaluated.record(directory / "qat", parents={"quantize": "quantize"}, fake_quantized="mxfp4", scale_rule="ceil")
    evaluated.record_export(directory, **export)  # type: ignore[arg-type]
    evaluated.record_verify(directory)
    return directory


def report(*directories: Path) -> Content:
    return content.collect(runs.find([str(directory) for directory in directories]), 5)


def verdict(run_dir: Path) -> Verdict:
    (found,) = report(run_dir).verdicts
    return found


def tile(found: Verdict, title: str) -> str:
    (each,) = (tile for tile in found.tiles if tile.title.startswith(title))
    return f"{each.value}: {'; '.join(each.notes)}"


def test_a_verified_export_with_the_answers_of_sft_is_shipped(tmp_path: Path) -> None:
    found = verdict(run_with_export(tmp_path / "run"))
    assert found.decision.outcome is Outcome.ship
    assert (
        "the MXFP4 export is as good as SFT within 5 points in exact match and format health" in found.decision.headline
    )
    assert "on 400 prompts" in found.decision.headline and "measured as" not in found.decision.headline
    assert tile(found, "Quality kept against SFT").startswith("+0.0 points: ")
    assert tile(found, "Verified").startswith("2 checks passed: equal to the trained model, bit for bit; no engine")
    assert tile(found, "Time and memory").startswith("40 s: sft, quantize, qat, export; at most 2.00 MB of host")


def test_a_worse_export_is_not_shipped(tmp_path: Path) -> None:
    run_dir = run_with_export(tmp_path / "run", parents={"model": "quantize"}, details={"exported_from": "quantize"})
    path = run_dir / "evaluate" / "export" / "generations.jsonl"
    path.write_text((run_dir / "evaluate" / "quantize" / "generations.jsonl").read_text())
    decision = verdict(run_dir).decision
    assert decision.outcome is Outcome.do_not_ship and "its exact match is 25.0 points lower" in decision.headline


def rewrite_answers(run_dir: Path, **facts: object) -> None:
    """Change fields of all answers of all models."""
    for path in (run_dir / "evaluate").glob("*/generations.jsonl"):
        lines = [{**json.loads(line), **facts} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_models_that_answer_nothing_right_are_not_decided(tmp_path: Path) -> None:
    run_dir = run_with_export(tmp_path / "run")
    rewrite_answers(run_dir, answer="8")
    decision = verdict(run_dir).decision
    assert decision.outcome is Outcome.not_decided
    assert "SFT itself passes less than 10 % of the prompts in exact match (0.0 %)" in decision.headline


def test_answers_without_expected_values_are_not_decided(tmp_path: Path) -> None:
    run_dir = run_with_export(tmp_path / "run")
    rewrite_answers(run_dir, expected={})
    decision = verdict(run_dir).decision
    assert decision.outcome is Outcome.not_decided and "in format health alone" in decision.headline


def test_answers_that_reached_the_limit_of_tokens_are_not_decided(tmp_path: Path) -> None:
    run_dir = run_with_export(tmp_path / "run")
    rewrite_answers(run_dir, finish="length")
    decision = verdict(run_dir).decision
    assert decision.outcome is Outcome.not_decided
    assert "400 of the 400 answers of SFT reached the limit of tokens" in decision.headline
    assert "400 of the 400 answers of Exported reached the limit of tokens" in decision.headline


def test_a_proof_of_other_files_does_not_count(tmp_path: Path) -> None:
    run_dir = run_with_export(tmp_path / "run")
    evaluated.record_verify(run_dir, checkpoint="earlier")
    found = verdict(run_dir)
    assert found.decision.outcome is Outcome.not_verified
    assert tile(found, "Verified") == "no: stage=verify has not passed on this export"


def test_without_answers_the_export_is_not_measured(tmp_path: Path) -> None:
    found = verdict(run_with_export(tmp_path / "run", answers=False))
    assert found.decision.outcome is Outcome.not_measured
    assert tile(found, "Quality kept") == "not measured: no answers were compared; validation loss 2.060 (+3.0 %)"


def test_answers_of_the_exported_model_count_if_the_export_was_proven_equal_to_it(tmp_path: Path) -> None:
    run_dir = run_with_export(tmp_path / "run", ("sft", "quantize", "qat"), target="gguf", kind="foreign")
    decision = verdict(run_dir).decision
    assert decision.outcome is Outcome.ship and "(target gguf)" in decision.headline
    assert "measured as QAT" in decision.headline
    evaluated.record_verify(run_dir, model=None)
    assert verdict(run_dir).decision.outcome is Outcome.not_measured


def test_answers_of_a_model_that_rounds_otherwise_do_not_count(tmp_path: Path) -> None:
    run_dir = run_with_export(tmp_path / "run", ("sft", "quantize", "qat"), scale_rule="mse", kind="foreign")
    assert verdict(run_dir).decision.outcome is Outcome.not_measured


def parts_run(directory: Path, **verified: object) -> Path:
    """Make an evaluated run whose SFT left the experts in MXFP4, with an export that only engines can load."""
    origin = {"parents": {"model": "sft"}, "details": {"exported_from": "sft"}}
    run_with_export(directory, ("upcast", "sft"), target="openai", kind="foreign", **origin)
    evaluated.record(directory / "sft", kind="packed", format="mxfp4")
    evaluated.record_verify(directory, **{"model": "sft", **verified})  # type: ignore[arg-type]
    return directory


def test_an_export_that_was_proven_equal_to_its_reference_is_decided_by_the_references_answers(tmp_path: Path) -> None:
    found = verdict(parts_run(tmp_path / "run"))
    assert found.decision.outcome is Outcome.ship
    assert "as good as SFT within 5 points" in found.decision.headline
    assert "on 400 prompts, measured as SFT" in found.decision.headline


def test_the_command_that_measures_an_export_is_named(tmp_path: Path) -> None:
    def headline(run_dir: Path) -> str:
        decision = verdict(run_dir).decision
        assert decision.outcome is Outcome.not_measured
        return decision.headline

    evaluate = "stage=evaluate eval=full evaluate.source"
    assert headline(parts_run(tmp_path / "compared", model=None)).endswith("(run stage=verify).")
    assert f"(run {evaluate}=export)" in headline(run_with_export(tmp_path / "own", ("sft", "quantize", "qat")[:1]))
    otherwise = run_with_export(tmp_path / "otherwise", ("sft", "qat"), scale_rule="mse", kind="foreign")
    assert f"(run stage=export export.target=bf16 export.source=qat, then {evaluate}=export)" in headline(otherwise)
    twin = run_with_export(tmp_path / "twin", ("sft",), kind="foreign")
    assert f"(run {evaluate}=qat)" in headline(twin)
    assert f"(run {evaluate}=all)" in headline(run_with_export(tmp_path / "none", answers=False))


def test_a_training_stage_that_raised_the_loss_stops_the_export(tmp_path: Path) -> None:
    run_dir = run_with_export(tmp_path / "run")
    rounding = {"parents": {"quantize": "quantize"}, "fake_quantized": "mxfp4", "scale_rule": "ceil"}
    losses = {"validation_loss_before": 2.2, "validation_loss": 2.4}
    evaluated.record(run_dir / "qat", details=losses, **rounding)
    decision = verdict(run_dir).decision
    assert decision.outcome is Outcome.do_not_ship
    assert "because QAT raised the validation loss from 2.200 to 2.400" in decision.headline
    evaluated.record(run_dir / "qat", details={**losses, "validation_loss": 2.3}, **rounding)
    assert verdict(run_dir).decision.outcome is Outcome.ship


def test_an_export_with_a_far_higher_loss_than_the_original_is_not_shipped(tmp_path: Path) -> None:
    models = ("upcast", *LOSSES)
    assert verdict(run_with_export(tmp_path / "good", models)).decision.outcome is Outcome.ship
    run_dir = run_with_export(tmp_path / "bad", models)
    path = run_dir / "evaluate" / "artifact.json"
    artifact = json.loads(path.read_text())
    artifact["details"]["results"]["upcast"]["validation_loss"] = 1.5
    path.write_text(json.dumps(artifact))
    decision = verdict(run_dir).decision
    assert decision.outcome is Outcome.do_not_ship
    assert "training with rounding raised the validation loss from 1.500 to 2.060" in decision.headline


def test_a_proof_against_the_base_alone_is_named(tmp_path: Path) -> None:
    run_dir = run_with_export(tmp_path / "run")
    evaluated.record_verify(run_dir, model=None)
    found = verdict(run_dir)
    assert found.decision.outcome is Outcome.ship
    assert found.decision.headline.endswith("verified against the base model alone, not the trained model.")
    assert "compared with the base model alone, not with the trained model" in tile(found, "Verified")


def test_an_export_of_a_control_must_match_the_sft_of_its_run(tmp_path: Path) -> None:
    origin = {"parents": {"model": CONTROL}, "details": {"exported_from": CONTROL}}
    run_dir = run_with_export(tmp_path / "run", ("sft", CONTROL, "export"), **origin)
    evaluated.record_verify(run_dir, model=CONTROL)
    facts = {"parents": {"sft": "sft"}, "details": {"method": "stochastic"}}
    evaluated.record(run_dir / CONTROL, kind="packed", format="mxfp4", fingerprint=CONTROL, **facts)
    found = report(run_dir)
    assert found.verdicts[0].decision.outcome is Outcome.ship
    assert {row.model: row.twin for row in found.rows}["export"] == CONTROL


def test_engines_that_loaded_the_export_are_named(tmp_path: Path) -> None:
    run_dir = run_with_export(tmp_path / "run")
    evaluated.record_verify(run_dir, engine="vllm")
    assert tile(verdict(run_dir), "Verified").endswith("bit for bit; loaded by vllm")


def test_a_run_without_an_export_has_nothing_to_ship(tmp_path: Path) -> None:
    assert verdict(evaluated.run(tmp_path / "run", {"sft": ALL})).decision.outcome is Outcome.no_export


def test_each_export_of_several_runs_has_its_own_verdict(tmp_path: Path) -> None:
    good, other = run_with_export(tmp_path / "good"), run_with_export(tmp_path / "other", fingerprint="another")
    found = report(good, other).verdicts
    assert [(each.label, each.decision.outcome) for each in found] == [
        ("good", Outcome.ship),
        ("other", Outcome.not_verified),
    ]


def test_an_export_is_as_large_as_its_tensors_whatever_its_layout(tmp_path: Path) -> None:
    """An export in plain BF16 has the values of a 4-bit format, but not its size."""
    run_dir = run_with_export(tmp_path / "run", target="bf16", kind="checkpoint", details={"tensor_bytes": 1_170_000})
    found = report(run_dir)
    sizes = {row.model: row.figures["served_bytes"] for row in found.rows}
    assert sizes["export"] == 1_170_000 and sizes["qat"] < sizes["export"]
    assert tile(found.verdicts[0], "Weights in memory").startswith("1.17 MB: ")
    sentences = [sentence for finding in found.findings for sentence in finding.sentences]
    assert any(sentence.startswith("Size when served: 1.17 MB in BF16.") for sentence in sentences)


@pytest.mark.parametrize("fingerprint", ["export", "qat"], ids=["other bytes", "the twin's bytes"])
def test_an_export_and_its_twin_are_one_point(fingerprint: str, tmp_path: Path) -> None:
    run_dir = run_with_export(tmp_path / "run", fingerprint=fingerprint)
    size = {row.model: row.figures["served_bytes"] for row in report(run_dir).rows}["qat"]
    evaluated.record_export(run_dir, fingerprint=fingerprint, details={"tensor_bytes": size})
    (chart,) = (chart for chart in report(run_dir).charts if chart.kind == "tradeoff")
    assert [series.name for series in chart.series] == ["SFT", "PTQ", "QAT = Exported"]
    assert chart.series[-1].points[0].value == LOSSES["export"]  # QAT has 2.05 and would dominate it
    assert "QAT = Exported" in chart.best and "Dominated: PTQ." in chart.description


def test_an_export_of_another_size_than_its_twin_is_joined_with_it_and_not_dominated(tmp_path: Path) -> None:
    run_dir = run_with_export(tmp_path / "run")
    size = {row.model: row.figures["served_bytes"] for row in report(run_dir).rows}["qat"]
    evaluated.record_export(run_dir, target="bf16", details={"tensor_bytes": 1.1 * size})
    (chart,) = (chart for chart in report(run_dir).charts if chart.kind == "tradeoff")
    assert chart.joined == [("Exported", "QAT")] and {"Exported", "QAT"} <= set(chart.best)
    assert "Exported" not in chart.description.partition("Dominated")[2]


@pytest.mark.parametrize("export", [{"scale_rule": "mse"}, {"format": "nvfp4"}])
def test_an_export_with_other_values_is_no_twin(export: dict[str, object], tmp_path: Path) -> None:
    found = report(run_with_export(tmp_path / "run", **export))
    assert [row.twin for row in found.rows] == [None] * 4


def test_an_export_of_an_earlier_model_is_refused(tmp_path: Path) -> None:
    run_dir = run_with_export(tmp_path / "run", parents={"model": "another"})
    with pytest.raises(UserError, match="run/export was made from an earlier qat, which was rebuilt later"):
        report(run_dir)


def test_the_report_has_no_local_path(tmp_path: Path) -> None:
    """Only answers, which models write, may contain paths."""
    local = tmp_path / "somewhere" / "gpt"
    usual = {
        "base_model": {"path": str(local), "revision": None},
        "settings": {"data.path": str(tmp_path / "rows.jsonl")},
    }
    run_dir = evaluated.run(tmp_path / "run", {"sft": ALL, str(tmp_path / "other"): ALL}, **usual)
    evaluated.record_export(run_dir, details={"exported_from": str(local), "exported_directory": str(local)})
    found = report(run_dir)
    texts = [
        page.render(found, plots.draw(found.charts)),
        content.to_markdown(found),
        repr(found.to_json()),
        *map(repr, (t.cells() for t in found.tests)),
    ]
    assert not [text for text in texts if str(tmp_path) in text or "somewhere" in text]
    assert found.about.facts["Base model"] == "gpt"
    assert found.about.facts["Evaluation data"].startswith("rows.jsonl, fingerprint ")
    assert [row.title for row in found.rows] == ["SFT", "other"]


def test_the_report_tells_date_version_settings_and_hardware(tmp_path: Path) -> None:
    run_dir = run_with_export(tmp_path / "run")
    made_on = {"git_commit": "0123456789abcdef+changes", "device": "NVIDIA H200", "processes": 2, "python": "3.11.7"}
    libraries = {"torch": "2.13.0", "transformers": "5.14.1"}
    facts = {
        "settings": {"qat.learning_rate": 1e-5, "qat.method": "lora"},
        "fake_quantized": "mxfp4",
        "scale_rule": "ceil",
    }
    evaluated.record(run_dir / "qat", parents={"quantize": "quantize"}, **facts, **made_on)
    (run_dir / "evaluate" / "metrics.jsonl").write_text('{"time": 1700000000.0, "model": "sft"}\n')
    evaluated.add(run_dir / "evaluate", libraries=libraries, **made_on)
    found = report(run_dir).about
    assert found.summary.startswith("gpt-oss-qat ") and "commit 0123456789ab+changes;" in found.summary
    assert found.summary.endswith("; evaluated on 2023-11-14, 22:13 UTC, 2 × NVIDIA H200")
    assert found.facts["Libraries"] == "torch 2.13.0, transformers 5.14.1, Python 3.11.7"
    (line,) = (line for line in found.stages if line.stage == "qat")
    assert line.cells() == ["qat", "qat.method=lora, qat.learning_rate=1e-05", "2 × NVIDIA H200"]


def not_evaluated(*models: str, **export: Any) -> list[str]:
    run_dir = Path(export.pop("run_dir"))
    run_with_export(run_dir, models, **export)
    return list(list_not_evaluated(models, runs.find([str(run_dir)])))


def test_models_that_were_not_evaluated_are_listed_with_what_evaluates_them(tmp_path: Path) -> None:
    models = ("upcast", "sft", "quantize", "qat")
    assert not_evaluated("sft", "qat", run_dir=tmp_path / "some") == [
        "not evaluated: upcast, quantize, export (evaluate.source=all evaluates every stage there is)"
    ]
    assert not_evaluated(*models, target="nvfp4", kind="foreign", run_dir=tmp_path / "nvfp4") == [
        "not evaluated: export, because transformers cannot load nvfp4. verify compares its weights"
    ]
    assert list(list_not_evaluated((*models, "export/mxfp4"), [])) == []
