"""The divergences of roundings are those of whole models, and the rounding with the lowest one is chosen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoints.reading import Checkpoint
from pipeline.config import QuantizeConfig, RoundingMethod, RoundingScales, TinyConfig
from pipeline.data.harmony import IGNORED
from pipeline.errors import CheckFailed
from pipeline.models import loading, losses, saving
from pipeline.models.references import ModelRef
from pipeline.models.tiny_model import create_tiny
from pipeline.models.weights import Weights
from pipeline.numerics.formats import MXFP4, NVFP4, NVFP4_W4A4
from pipeline.quantize import rounding, selection
from pipeline.quantize.rounding import Job
from pipeline.quantize.selection import Divergence
from pipeline.runs.metrics import METRICS_FILE, read_metrics

LENGTHS, PROMPTS = (80, 30, 50), (20, 10, 50)  # the last example has no supervised token


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "tiny"
    create_tiny(directory, TinyConfig())
    return directory


@pytest.fixture(scope="module")
def jobs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    """Two roundings of a model with larger experts: to the nearest values, and stochastic."""
    trained = tmp_path_factory.mktemp("trained")
    saving.write_plain(ModelRef("base", base, base), trained)
    for path in trained.glob("*.safetensors"):
        tensors = {name: each * (9 if "_proj" in name else 1) for name, each in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    weights = Weights(ModelRef("x", trained, trained, dtype=torch.float32))
    nearest = Job(weights, Checkpoint(base), None, MXFP4, "floor", None, "cpu")
    return [nearest, replace(nearest, rule="ceil", seed=1)]


def examples() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(500, (length,), generator=generator).tolist() for length in LENGTHS]
    return [
        {"input_ids": each, "labels": [IGNORED] * prompt + each[prompt:]}
        for each, prompt in zip(ids, PROMPTS, strict=True)
    ]


def whole_model_divergences(directory: Path, trained: Path) -> list[torch.Tensor]:
    """Compute KL(trained || rounded) of the supervised tokens of each example, with transformers and float64."""
    models = [loading.load_plain(each, torch.float32) for each in (trained, directory)]
    found = []
    for example in examples():
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        with torch.no_grad():
            logits = [model(input_ids=ids, use_cache=False).logits[0, :-1].double() for model in models]
        first, second = (torch.distributions.Categorical(logits=each) for each in logits)
        found.append(torch.distributions.kl_divergence(first, second)[labels[1:] != IGNORED])
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_divergence_is_that_of_the_whole_models(batch_size: int, jobs: list[Job], tmp_path: Path) -> None:
    found = selection.measure(jobs, losses.batches(examples(), batch_size, 0), "eager")
    for number, (job, each) in enumerate(zip(jobs, found, strict=True)):
        directory = tmp_path / str(number)
        directory.mkdir()
        rounding.write_plain(job, directory)
        expected = whole_model_divergences(directory, job.weights.ref.directory)
        tokens = torch.cat(expected)
        assert each.kl_divergence == pytest.approx(float(tokens.mean()), rel=1e-3)
        rest = [float(part.sum() - tokens.mean() * len(part)) for part in expected if len(part)]
        error = (sum(one**2 for one in rest) * len(rest) / (len(rest) - 1)) ** 0.5 / len(tokens)
        assert each.standard_error == pytest.approx(error, rel=1e-2)


def test_candidates_ask_for_what_the_user_could_ask_for() -> None:
    asked = QuantizeConfig(method=RoundingMethod.auto)
    named = [(each.method.name, each.scales) for each in selection.candidates(asked, MXFP4, has_own_scales=True)]
    expected: list[Any] = [("nearest", RoundingScales.ceil), ("nearest", RoundingScales.base)]
    assert named == [*expected, ("stochastic", None), ("gptq", None)]
    found = selection.candidates(replace(asked, scales=RoundingScales.floor), MXFP4, has_own_scales=True)
    assert [(each.method.name, each.scales) for each in found] == [
        (name, RoundingScales.floor) for name in ("nearest", "stochastic", "gptq")
    ]
    plain = selection.candidates(asked, NVFP4.with_rule("mse"), has_own_scales=False)
    assert [each.method.name for each in plain] == ["nearest", "stochastic", "gptq"]
    with_inputs = selection.candidates(asked, NVFP4_W4A4.with_rule("mse"), has_own_scales=False)
    assert [each.method.name for each in with_inputs] == ["nearest", "stochastic"]


def test_the_lowest_divergence_is_chosen_and_measured_once(
    jobs: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = [QuantizeConfig(), QuantizeConfig(method=RoundingMethod.stochastic)]
    best, figures = selection.choose(tried, jobs, lambda: [Divergence(0.2, 0.01), Divergence(0.1, 0.02)], tmp_path)
    assert best == 1
    assert figures[1] == {"method": "stochastic", "scales": "ceil", "kl_divergence": 0.1, "standard_error": 0.02}
    assert [line["kl_divergence"] for line in read_metrics(tmp_path)] == [0.2, 0.1]
    assert "stochastic scales=ceil  divergence from the unrounded model 0.1 ± 0.02, chosen" in capsys.readouterr().out
    (tmp_path / METRICS_FILE).unlink()  # the stage does this when it resumes
    assert selection.choose(tried, jobs, lambda: pytest.fail("measured again"), tmp_path) == (best, figures)
    assert [line["kl_divergence"] for line in read_metrics(tmp_path)] == [0.2, 0.1]


def test_a_divergence_that_is_not_finite_is_never_chosen(jobs: list[Job], tmp_path: Path) -> None:
    found = [Divergence(float("nan"), 0.0), Divergence(0.1, 0.0)]
    with pytest.raises(CheckFailed, match="divergence of nearest rounding is nan"):
        selection.choose([QuantizeConfig(), QuantizeConfig()], jobs, lambda: found, tmp_path)
