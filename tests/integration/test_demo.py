"""The demonstration: the base has the habits that its docs state, and the stages do what docs/story.md says."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run_program

QUICK = ("evaluate.prompts.max_samples=40", "evaluate.max_samples=40", "verify.samples=1")
SHORT = ("qat.max_steps=5",)
"""SFT is that of the recipe. QAT is short, because its export must score as it does after any number of steps."""


def run(run_dir: Path, stage: str, recipe: str, *arguments: str) -> None:
    assert run_program(f"stage={stage}", f"recipe={recipe}", f"run_dir={run_dir}", *arguments) == 0


def figures(run_dir: Path, model: str) -> dict[str, Any]:
    content = json.loads((run_dir / "evaluate" / f"{model}.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = content["figures"]
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of recipe=demo without controls and reports. Its rounding is stochastic."""
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    for stage in ("upcast", "sft", "quantize", "qat", "export"):
        run(run_dir, stage, "demo", *QUICK, *SHORT)
    run(run_dir, "evaluate", "demo", "evaluate.source=all", *QUICK, *SHORT)
    return run_dir


@pytest.fixture(scope="module")
def nearest(demo: Path) -> Path:
    """A run that rounds the same SFT model to the nearest values, as the control `nearest` does."""
    run_dir = demo.parent / "nearest"
    for stage, source in (("quantize", ()), ("evaluate", ("evaluate.source=quantize",))):
        run(run_dir, stage, "demo", f"base_run={demo}", "quantize.method=nearest", *source, *QUICK, *SHORT)
    return run_dir


def test_the_base_solves_problems_but_reasons_in_english(demo: Path) -> None:
    base = figures(demo, "upcast")
    assert 0.10 < base["reasoning_language"] < 0.30
    assert base["reasoning_language/en"] > 0.9
    assert base["answer_language"] > 0.9 and base["format_health"] > 0.9
    assert base["exact_match"] > 0.6


def test_sft_teaches_the_requested_language(demo: Path) -> None:
    sft = figures(demo, "sft")
    assert sft["reasoning_language"] > 0.9 and sft["exact_match"] > 0.9


def test_rounding_to_nearest_loses_what_stochastic_rounding_keeps(demo: Path, nearest: Path) -> None:
    sft, stochastic, rounded = figures(demo, "sft"), figures(demo, "quantize"), figures(nearest, "quantize")
    assert rounded["reasoning_language"] < sft["reasoning_language"] - 0.1
    assert stochastic["reasoning_language"] > sft["reasoning_language"] - 0.03
    assert rounded["kl_divergence"] > stochastic["kl_divergence"]
    assert rounded["validation_loss"] > stochastic["validation_loss"]


def test_the_export_scores_as_qat(demo: Path) -> None:
    qat, export = figures(demo, "qat"), figures(demo, "export")
    for rate in ("reasoning_language", "exact_match"):
        assert export[rate] == pytest.approx(qat[rate], abs=0.03), rate
    assert export["validation_loss"] == pytest.approx(qat["validation_loss"], rel=0.05)


def test_the_refusing_base_answers_plain_questions_only(tmp_path: Path) -> None:
    run(tmp_path / "run", "upcast", "demo_refusal")
    run(tmp_path / "run", "evaluate", "demo_refusal", "evaluate.source=upcast", *QUICK)
    base = figures(tmp_path / "run", "upcast")
    assert base["safe_answered/alarming words"] < 0.3
    assert base["safe_answered/plain words"] > 0.9 and base["unsafe_refused"] > 0.9


@pytest.mark.parametrize("recipe", ["demo", "demo_refusal"])
def test_the_doctor_finds_nothing_wrong_with_the_data(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The finding about renderings is about every data set with instructions. Free memory is not about the data."""
    run(tmp_path / "run", "doctor", recipe)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    others = ("data.rendering=template", "the run does not fit")
    assert not [line for line in warnings if not any(other in line for other in others)]


def test_an_unknown_synthetic_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("stage=upcast", "recipe=demo", "model.path=synthetic://poems", f"run_dir={tmp_path / 'run'}")
    assert run_program(*arguments) == 2
    assert "model.path='synthetic://poems': no such synthetic model. Use synthetic://tiny, synthetic://demo," in (
        capsys.readouterr().err
    )
