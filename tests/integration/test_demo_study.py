"""The README, docs/story.md and its plot show the figures of docs/demo.json, and the study reads those of a run."""

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import run_program

from scripts.demo_study import page, plot, results, runs, tables
from scripts.demo_study.results import Results

CASE = runs.CASES[0]
SVG = "{http://www.w3.org/2000/svg}"
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


def drawn(svg: str) -> dict[str, np.ndarray]:
    """Return the points and the intervals of a plot by name: coordinates as shares of the axes' width and height."""
    found = {}
    for axes in ElementTree.fromstring(svg).iterfind(f".//{SVG}g"):
        if not axes.get("id", "").startswith("axes_"):
            continue
        (frame, *_) = axes.iterfind(f"{SVG}g/{SVG}path")
        corners = coordinates(frame)
        low, size = corners.min(0), np.ptp(corners, 0)
        for group in axes.iterfind(f"{SVG}g"):
            if re.match("points-|intervals-", group.get("id", "")):
                shapes = [*group.iterfind(f".//{SVG}g/{SVG}use"), *group.iterfind(f"{SVG}path")]
                found[group.get("id", "")] = (np.concatenate([coordinates(shape) for shape in shapes]) - low) / size
    return found


def coordinates(shape: ElementTree.Element) -> np.ndarray:
    """Return the corners of a path, or the place of a marker. Shape (N, 2)."""
    text = shape.get("d") or f"{shape.get('x')} {shape.get('y')}"
    return np.array(re.findall(r"-?[\d.]+", text), float).reshape(-1, 2)


def test_the_plot_shows_the_results() -> None:
    """The sizes of axes depend on the version of matplotlib, so points are compared by their places in the axes."""
    wanted, found = (drawn(svg) for svg in (plot.draw(Results.read(page.RESULTS)), page.PLOT.read_text("utf-8")))
    assert wanted.keys() == found.keys() and wanted
    for name, places in wanted.items():
        assert np.allclose(found[name], places, atol=1e-3), f"{name}: run scripts/study_demo --table"


def test_no_seed_is_left_out() -> None:
    found = Results.read(page.RESULTS)
    for case in runs.CASES:
        seeds = list(found.seeds(case.name))
        assert len(seeds) >= 5 and seeds == [str(seed) for seed in range(len(seeds))], case.name


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the study with one short run."""
    made = tmp_path_factory.mktemp("study")
    assert run_program("stage=all", *runs.arguments(CASE, 0, made / CASE.name / "seed0"), *SHORT) == 0
    return made


def test_the_figures_of_a_run_are_read_and_collected(directory: Path) -> None:
    run_dir = directory / CASE.name / "seed0"
    results.store(directory, CASE.name, 0, runs.read_figures(run_dir, CASE))
    results.collect(directory, directory / "demo.json")
    found = Results.read(directory / "demo.json")
    assert found.models(CASE.name) == ["upcast", "sft", "rounded/stochastic", "qat", "export"]
    report = json.loads((run_dir / "compare" / "compare.json").read_text(encoding="utf-8"))
    (sft,) = (row for row in report["rows"] if row["model"] == "sft")
    mean = found.mean(CASE.name, "sft", "validation_loss")
    assert mean is not None and mean.mean == pytest.approx(sft["validation_loss"], rel=1e-5)
    assert "| SFT + QAT |" in tables.models_table(found, CASE)
    seed = found.seeds(CASE.name)["0"]
    assert {"doctor", "sft", "qat", "verify"} <= set(seed["seconds"])
    assert seed["models"]["rounded/stochastic"]["rounding"] == "stochastic, base"
    assert seed["prompts"]["exact_match"] == 4
    groups = [name for name in seed["models"]["sft"] if name.startswith("reasoning_language/")]
    assert sum(seed["prompts"][name] for name in groups) == 4


def test_a_run_has_the_commit_and_the_versions_of_all_its_stages(directory: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(directory / CASE.name / "seed0", run_dir, symlinks=True)
    path = run_dir / "verify" / "artifact.json"
    artifact = json.loads(path.read_text(encoding="utf-8"))
    found = runs.read_figures(run_dir, CASE)["environment"]
    assert (found["commit"], found["torch"]) == (artifact["git_commit"], artifact["libraries"]["torch"])
    path.write_text(json.dumps({**artifact, "git_commit": "another"}), encoding="utf-8")
    with pytest.raises(ValueError, match="different environments made its stages"):
        runs.read_figures(run_dir, CASE)
