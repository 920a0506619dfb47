"""The README, docs/story.md and its plot show the figures of docs/demo.json, and the study reads those of a run."""

import json
from pathlib import Path

import pytest
from conftest import run_program

from scripts.demo_study import page, results, runs, tables
from scripts.demo_study.results import Results

CASE = runs.CASES[0]
SHORT = (
    "controls=false",
    "data.max_samples=64",
    "evaluate.max_samples=8",
    "evaluate.prompts.max_samples=4",
    "verify.samples=1",
)


@pytest.mark.parametrize("path", page.texts(page.RESULTS), ids=lambda path: path.name)
def test_the_pages_have_the_tables_of_the_results(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == page.texts(page.RESULTS)[path], "run scripts/study_demo --table"


def test_the_plot_shows_the_results() -> None:
    assert Results.read(page.RESULTS).digest() in page.PLOT.read_text(encoding="utf-8"), (
        "run scripts/study_demo --table"
    )


def test_no_seed_is_left_out() -> None:
    found = Results.read(page.RESULTS)
    for case in tables.present(found):
        assert list(found.seeds(case.name)) == [str(seed) for seed in range(len(found.seeds(case.name)))], case.name


def test_the_figures_of_a_run_are_read_and_collected(tmp_path: Path) -> None:
    run_dir = tmp_path / CASE.name / "seed0"
    assert run_program("stage=all", *runs.arguments(CASE, 0, run_dir), *SHORT) == 0
    results.store(tmp_path, CASE.name, 0, runs.read_figures(run_dir, CASE))
    results.collect(tmp_path, tmp_path / "demo.json")
    found = Results.read(tmp_path / "demo.json")
    assert found.models(CASE.name) == ["upcast", "sft", "rounded/stochastic", "qat", "export"]
    report = json.loads((run_dir / "compare" / "compare.json").read_text(encoding="utf-8"))
    (sft,) = (row for row in report["rows"] if row["model"] == "sft")
    mean = found.mean(CASE.name, "sft", "validation_loss")
    assert mean is not None and mean.mean == pytest.approx(sft["validation_loss"], rel=1e-5)
    assert {"sft", "qat", "verify"} <= set(found.seeds(CASE.name)["0"]["seconds"])
    assert "| SFT + QAT |" in tables.models_table(found, CASE)
