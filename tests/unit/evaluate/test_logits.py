"""Differences between the predictions of a model and of a reference, on small random gpt-oss models.

The expected divergence is computed with torch.distributions.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import gpt_oss
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from pipeline.data.harmony import IGNORED
from pipeline.evaluate.scorers import logits
from pipeline.evaluate.subject import Subject
from pipeline.models import chunked_logits
from pipeline.models.losses import batches
from pipeline.models.references import ModelRef

VOCABULARY = 61


def model(seed: int) -> Any:
    return gpt_oss(VOCABULARY, seed, num_hidden_layers=1, initializer_range=1.0).eval()


def examples() -> list[dict[str, list[int]]]:
    """Examples of different lengths, with unsupervised prompts."""
    made = []
    for prompt, supervised in ((3, 40), (1, 5), (6, 1), (2, 17)):
        ids = [(7 * i + prompt) % VOCABULARY for i in range(prompt + supervised)]
        made.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return made


def make_batches() -> list[dict[str, Tensor]]:
    return batches(examples(), 3, 0)


def score(own: Any, reference: Any, directory: Path) -> dict[str, float]:
    logits.record(reference, make_batches(), directory)
    ref = ModelRef("qat", directory, directory)
    return logits.score(Subject(ref, own, None, None, make_batches(), reference_predictions=directory))


@torch.no_grad()
def expected(own: Any, reference: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute divergence, agreement and position of each supervised token. Examples run one at a time, unpadded."""
    divergence, agrees, position = [], [], []
    for example in examples():
        ids, start = torch.tensor([example["input_ids"]]), example["labels"].count(IGNORED)
        first, second = (each(input_ids=ids).logits[0, start - 1 : -1].double() for each in (own, reference))
        divergence.append(kl_divergence(Categorical(logits=second), Categorical(logits=first)))
        agrees.append((first.argmax(-1) == second.argmax(-1)).double())
        position.append(torch.arange(len(first)))
    return torch.cat(divergence), torch.cat(agrees), torch.cat(position)


def test_with_the_whole_vocabulary_the_divergence_equals_torchs(tmp_path: Path) -> None:
    found = score(model(1), model(0), tmp_path / "kept")
    divergence, agrees, position = expected(model(1), model(0))
    assert found["kl_divergence"] == pytest.approx(float(divergence.mean()), rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(float(agrees.mean()))
    early = position < 32
    assert found["kl_divergence/0-31"] == pytest.approx(float(divergence[early].mean()), rel=1e-4)
    assert found["kl_divergence/32-127"] == pytest.approx(float(divergence[~early].mean()), rel=1e-4)
    assert "kl_divergence/128-511" not in found


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    found = score(model(0), model(0), tmp_path / "kept")
    assert found["kl_divergence"] == pytest.approx(0.0, abs=1e-9)
    assert found["top1_agreement"] == 1.0


def test_the_divergence_of_the_likeliest_tokens_is_a_lower_bound_that_rises_with_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for top in (1, 4, 16, VOCABULARY - 1, VOCABULARY):
        monkeypatch.setattr(logits, "TOP", top)
        found.append(score(model(1), model(0), tmp_path / str(top))["kl_divergence"])
    assert found[0] > 0 and found[:4] == sorted(found[:4])
    assert found[-2] == pytest.approx(found[-1], rel=1e-6)  # one token is outside the top, so none are merged


def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score(model(1), model(0), tmp_path / "whole")
    monkeypatch.setattr(chunked_logits, "CHUNK", 7)
    assert score(model(1), model(0), tmp_path / "parts") == pytest.approx(whole, rel=1e-5)


def test_stored_predictions_do_not_grow_with_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "TOP", 4)
    logits.record(model(0), make_batches(), tmp_path / "kept")
    tokens = 40 + 5 + 1 + 17
    stored = sum(path.stat().st_size for path in (tmp_path / "kept").iterdir())
    assert stored < tokens * (5 * 4 + 4 * 4) + 2 * 256  # 256: a file's header


def test_without_a_reference_there_are_no_figures() -> None:
    assert logits.score(Subject(None, None, None, None, [])) == {}


@pytest.mark.parametrize("name", ["000000.safetensors", "digests.json"])
def test_predictions_with_a_flipped_bit_are_named_and_not_sound(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "predictions"
    assert not logits.are_sound(directory)
    logits.record(model(0), make_batches(), directory)
    assert logits.are_sound(directory)
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / name).write_bytes(content)
    assert not logits.are_sound(directory)
    told = capsys.readouterr().err
    assert str(directory) in told and "so the predictions are made again" in told
    logits.record(model(0), make_batches(), directory)
    assert logits.are_sound(directory)


def test_predictions_of_an_older_version_are_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logits.record(model(0), make_batches(), tmp_path / "predictions")
    (tmp_path / "predictions" / "digests.json").unlink()
    assert not logits.are_sound(tmp_path / "predictions")
    assert "predictions without digests, from an older version" in capsys.readouterr().out
