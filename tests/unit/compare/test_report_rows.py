"""Rows and tables of a report: the role and size of each model, dominated models, and unknown figures."""

import random
from pathlib import Path

import evaluated
import pytest
from exports import SIZES

from pipeline.checkpoints.gpt_oss import Shape, packed_tensors, plain_tensors
from pipeline.compare import content, examples, rows, runs, table
from pipeline.errors import UserError

SHAPE = Shape.of(SIZES, "tests")


def found(*directories: Path) -> list[rows.Row]:
    return rows.collect(runs.find([str(directory) for directory in directories]))


def four(directory: Path, **facts: str) -> Path:
    loss = {model: {"validation_loss": 2.0} for model in ("upcast", "sft", "quantize", "qat")}
    return evaluated.run(directory, figures=loss, **facts)  # type: ignore[arg-type]


def test_roles_list_the_steps_from_the_original(tmp_path: Path) -> None:
    run = four(tmp_path / "run")
    assert [row.role for row in found(run)] == ["original", "SFT", "SFT + PTQ", "SFT + QAT"]
    evaluated.record(run / "quantize", parents={"upcast": "upcast"}, fake_quantized="mxfp4")
    assert [row.role for row in found(run)] == ["original", "SFT", "PTQ", "QAT"]


def test_served_sizes_are_the_sizes_of_the_layouts(tmp_path: Path) -> None:
    run = four(tmp_path / "run")
    evaluated.record(run / "upcast", details={"decoded_tensors": 4}, parents={"source": "base"})
    plain, packed = (sum(info.bytes for info in layout(SHAPE).values()) for layout in (plain_tensors, packed_tensors))
    assert [row.figures["served_bytes"] for row in found(run)] == [packed, plain, packed, packed]


def test_a_model_of_several_runs_is_one_row_with_the_most_figures(tmp_path: Path) -> None:
    first = evaluated.run(tmp_path / "a", figures={"sft": {"validation_loss": 2.0}})
    second = evaluated.run(tmp_path / "b", figures={"sft": {"validation_loss": 2.0, "perplexity": 7.4}})
    assert [row.title for row in found(first, second)] == ["b: SFT"]


def test_undominated_rows_are_the_pareto_front(tmp_path: Path) -> None:
    draw = random.Random(0)
    names = [f"m{i}" for i in range(30)]
    figures = {name: {"weight_bytes": draw.randint(1, 9), "validation_loss": draw.randint(1, 9)} for name in names}
    every = found(evaluated.run(tmp_path / "run", figures=figures))
    best = rows.list_undominated(every, "weight_bytes", "validation_loss", is_higher_better=False)

    def beats(one: rows.Row, other: rows.Row) -> bool:
        differences = [one.figures[name] - other.figures[name] for name in ("weight_bytes", "validation_loss")]
        return max(differences) <= 0 and min(differences) < 0

    assert best == [row for row in every if not any(beats(other, row) for other in every)]
    assert 0 < len(best) < len(every)


def test_a_job_without_its_model_does_not_use_the_model_of_the_shared_run(tmp_path: Path) -> None:
    four(tmp_path / "base")
    job = evaluated.run(tmp_path / "job", figures={"qat": {"validation_loss": 1.9}}, fingerprints={"qat": "own"})
    (job / "evaluate" / "config.yaml").write_text(f"base_run: {tmp_path}/base\n")
    assert found(job)[0].lineage == {"upcast": "upcast", "sft": "sft", "quantize": "quantize", "qat": "own"}
    (job / "qat" / "artifact.json").unlink()
    assert (found(job)[0].lineage, found(job)[0].role) == ({}, "qat")


@pytest.mark.parametrize("content", [None, "base_run: [", "base_run: {a: \x07}"])
def test_a_job_whose_settings_cannot_be_read_is_one_message(tmp_path: Path, content: str | None) -> None:
    job = evaluated.run(tmp_path / "job", figures={"qat": {"validation_loss": 1.9}}, fingerprints={"qat": "own"})
    (job / "qat" / "artifact.json").unlink()
    path = job / "evaluate" / "config.yaml"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=f"^{path}: cannot be read .* Run stage=evaluate again with overwrite=true"):
        found(job)


def test_figures_of_groups_are_flat() -> None:
    nested = {"loss": {"de": 1.0}, "by_group": {"fr": {"loss": 2.0, "tokens": 3}}, "perplexity": 4.0}
    assert rows.flatten(nested) == {"loss/de": 1.0, "by_group_loss/fr": 2.0, "by_group_tokens/fr": 3, "perplexity": 4.0}


def test_unknown_figures_get_columns_and_intervals_are_shown(tmp_path: Path) -> None:
    interval = {"kl_divergence": 0.5, "kl_divergence_low": 0.25, "kl_divergence_high": 0.75}
    figures = {"sft": {"validation_loss": 2.0, "surprise_index": 0.12345, **interval}, "qat": {"validation_loss": 2.0}}
    every = found(evaluated.run(tmp_path / "run", figures=figures))
    shown = {each.title: each for each in table.make_tables(every, "sft")}["Other figures"]
    assert [column.title for column in shown.columns] == ["model", "surprise index"]
    assert shown.cells(every) == [["SFT", "0.123"], ["QAT", "–"]]
    main = table.make_tables(every, "sft")[0]
    at = main.titles().index("KL divergence (nats)")
    assert main.fields()[at] == "KL (nats)"
    assert [line[at] for line in main.cells(every)] == ["0.5 [0.2, 0.8]", "–"]


def test_a_rate_is_shown_with_its_interval_and_count(tmp_path: Path) -> None:
    rate = {"exact_match": 0.5, "exact_match_low": 0.1, "exact_match_high": 0.9, "exact_match_decided": 4.0}
    none = {"exact_match_decided": 0.0, "exact_match_undecided": 1.0}
    every = found(evaluated.run(tmp_path / "run", figures={"sft": rate, "qat": none}))
    shown = {each.title: each for each in table.make_tables(every, "sft")}["Models"]
    at = shown.titles().index("exact match")
    assert [line[at] for line in shown.cells(every)] == ["50 % [10, 90] of 4", "undecided"]


def test_a_bar_in_a_name_is_escaped_in_markdown(tmp_path: Path) -> None:
    every = found(evaluated.run(tmp_path / "run", figures={"a|b": {"perplexity": 1.0}}))
    shown = table.to_markdown(table.make_tables(every, None)[0], every)
    assert "| a\\|b |" in shown


ACCOUNT = {"relative_change": 0.0123, "kept": 0.514, "noise": 0.042, "changed_codes": 0.03, "changed_scales": 0.01}
KEPT = "What rounding kept"


def rounded(directory: Path, *, exported: str = "qat", kept: float | None = 0.25, **export: str) -> Path:
    """Write a run whose PTQ model and export have accounts. The export's parent has the fingerprint `exported`."""
    run = four(directory)
    details = {"dtype": "bfloat16", "quantizers": 8, "method": "stochastic", "scales": "base", "account": ACCOUNT}
    evaluated.record(run / "quantize", details=details, parents={"sft": "sft"}, fake_quantized="mxfp4")
    evaluated.record(run / "qat", parents={"quantize": "quantize"}, fake_quantized="mxfp4", scale_rule="ceil")
    facts = {"format": "mxfp4", "scale_rule": "ceil", **export}
    account = {**ACCOUNT, "kept": kept}
    evaluated.record_export(run, parents={"model": exported}, details={"account": account}, **facts)
    return run


def shown(run: Path) -> dict[str, list[str]]:
    """Return the cells of the table of rounding, by model."""
    every = found(run)
    made = table.make_rounding_table(every)
    assert made is not None and made.title == KEPT
    assert made.titles()[2:] == ["rounding", "relative change", "kept", "noise", "codes moved", "scales moved"]
    return {line[0]: line[2:] for line in made.cells(every)}


def test_the_accounts_of_ptq_and_of_the_export_of_qat_are_shown(tmp_path: Path) -> None:
    cells = shown(rounded(tmp_path / "run"))
    assert cells["SFT"] == ["–"] * 6
    assert cells["PTQ"] == ["stochastic, base", "1.23 %", "51.4 %", "4.20 %", "3.00 %", "1.00 %"]
    assert cells["QAT"] == ["nearest, ceil", "1.23 %", "25.0 %", "4.20 %", "3.00 %", "1.00 %"]


@pytest.mark.parametrize("other", [{"exported": "another"}, {"scale_rule": "mse"}, {"format": "nvfp4"}])
def test_qat_has_no_account_of_another_models_export_or_of_another_rounding(
    other: dict[str, str], tmp_path: Path
) -> None:
    assert shown(rounded(tmp_path / "run", **other))["QAT"] == ["–"] * 6


def test_experts_that_training_did_not_change_have_no_kept_share(tmp_path: Path) -> None:
    run = rounded(tmp_path / "run", kept=None)
    assert shown(run)["QAT"][2] == "–"
    sentences = content.collect(runs.find([str(run)]), 1).findings[0].sentences
    assert "Rounding of QAT (nearest, ceil): training did not change the experts." in sentences


def test_artifacts_of_older_versions_have_no_account(tmp_path: Path) -> None:
    run = four(tmp_path / "run")
    report = content.collect(runs.find([str(run)]), 1)
    assert KEPT not in [each.title for each in report.tables]
    assert not any("Rounding" in sentence for finding in report.findings for sentence in finding.sentences)
    assert all("rounding" not in row for row in report.to_json()["rows"])


def test_the_account_is_in_the_findings_and_in_the_json_of_the_report(tmp_path: Path) -> None:
    report = content.collect(runs.find([str(rounded(tmp_path / "run"))]), 1)
    text = " ".join(report.findings[0].sentences)
    assert "Rounding of PTQ (stochastic, base): training changed the experts by 1.23 %. Rounding keeps 51 %" in text
    assert "moves 3.00 % of the 4-bit values, and adds 4.20 % noise." in text
    written = {row["model"]: row.get("rounding") for row in report.to_json()["rows"]}
    assert written["quantize"] == {"method": "stochastic, base", "account": ACCOUNT}
    assert written["sft"] is None


def test_examples_on_which_models_disagree_come_first(tmp_path: Path) -> None:
    passed = {"sft": [True, True, True], "qat": [True, True, False]}
    chosen = examples.choose(found(evaluated.run(tmp_path / "run", passed)), 2)
    assert [example.prompt_id for example in chosen] == ["p2", "p0"]
    assert [example.disagreements for example in chosen] == [["exact_match"], []]
    assert [each.verdicts["exact_match"] for each in chosen[0].answers] == ["passed", "failed"]


def test_an_example_has_the_answer_of_the_data_or_else_the_expected_answer(tmp_path: Path) -> None:
    given = [evaluated.answer(0, "8", reference="3 + 4 = 7"), evaluated.answer(1, "8")]
    run = evaluated.run(tmp_path / "run", answers={"sft": given, "qat": given})
    assert [each.reference for each in examples.choose(found(run), 2)] == ["3 + 4 = 7", evaluated.RIGHT]


def test_the_best_values_of_a_column_are_marked_unless_all_are_equal(tmp_path: Path) -> None:
    losses = {"sft": 2.0, "quantize": 2.2, "qat": 2.0001}
    figures = {model: {"validation_loss": loss, "top1_agreement": 0.5} for model, loss in losses.items()}
    every = found(evaluated.run(tmp_path / "run", figures=figures))
    main = table.make_tables(every, None)[0]
    marks = {title: [line[i] for line in main.best(every)] for i, title in enumerate(main.titles())}
    assert marks["validation loss"] == [True, False, True]  # 2.0001 is printed as 2.000
    assert marks["top-1 agreement"] == marks["model"] == [False] * 3
    assert "| **2.000** |" in table.to_markdown(main, every)


def test_a_line_that_is_not_an_answer_is_an_error_with_its_file(tmp_path: Path) -> None:
    run = evaluated.run(tmp_path / "run", {"sft": [True]})
    (run / "evaluate" / "sft" / "generations.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"sft/generations\.jsonl: a line is not an answer"):
        found(run)


def test_the_report_as_json_has_every_figure(tmp_path: Path) -> None:
    run = evaluated.run(tmp_path / "run", {"sft": [True], "quantize": [False]}, {"sft": {"validation_loss": 2.0}})
    plain = content.collect(runs.find([str(run)]), 1).to_json()
    assert [row["model"] for row in plain["rows"]] == ["sft", "quantize"]
    assert plain["rows"][0]["validation_loss"] == 2.0
    (test,) = (test for test in plain["tests"] if test["figure"] == "exact_match")
    assert {"wins": 0, "losses": 1, "prompts": 1, "difference": -1.0}.items() <= test.items()
