"""The demonstration: the base has the habits that its docs state, and the ordinary stages change them."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run_program

QUICK = ("evaluate.prompts.max_samples=40", "evaluate.max_samples=40", "verify.samples=1")
SHORT = ("data.max_samples=320", "sft.learning_rate=1e-3", "qat.epochs=0.5")
"""SFT takes 20 steps, with a rate that suffices for the new habit. QAT takes 10 steps."""


def run(run_dir: Path, stage: str, recipe: str, *arguments: str) -> None:
    assert run_program(f"stage={stage}", f"recipe={recipe}", f"run_dir={run_dir}", *arguments) == 0


def figures(run_dir: Path, model: str) -> dict[str, Any]:
    content = json.loads((run_dir / "evaluate" / f"{model}.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = content["figures"]
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of recipe=demo."""
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    run(run_dir, "all", "demo", "controls=false", *QUICK, *SHORT)
    return run_dir


def test_the_base_solves_problems_but_reasons_in_english(demo: Path) -> None:
    base = figures(demo, "upcast")
    assert 0.10 < base["reasoning_language"] < 0.30
    assert base["reasoning_language/en"] > 0.9
    assert base["answer_language"] > 0.9 and base["format_health"] > 0.9
    assert base["exact_match"] > 0.6


def test_sft_teaches_the_requested_language_and_the_export_carries_it(demo: Path) -> None:
    for model in ("sft", "qat", "export"):
        assert figures(demo, model)["reasoning_language"] > 0.8, model


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
    """The finding about renderings is about every data set with instructions."""
    run(tmp_path / "run", "doctor", recipe)
    err = capsys.readouterr().err
    warnings = [line for line in err.splitlines() if "warning" in line and "data.rendering=template" not in line]
    assert not warnings


def test_an_unknown_synthetic_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("stage=upcast", "recipe=demo", "model.path=synthetic://poems", f"run_dir={tmp_path / 'run'}")
    assert run_program(*arguments) == 2
    assert "model.path='synthetic://poems': no such synthetic model. Use synthetic://tiny, synthetic://demo," in (
        capsys.readouterr().err
    )
