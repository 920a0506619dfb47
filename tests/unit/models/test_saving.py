"""All stages save checkpoints with the same size limit for weight files, whatever limit the upcast used."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoints.reading import Checkpoint
from pipeline.config import Sharding, TinyConfig, TrainConfig
from pipeline.models import loading, saving
from pipeline.models.references import ModelRef
from pipeline.models.tiny_model import create_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    create_tiny(directory, TinyConfig())
    return ModelRef("source", directory, directory)


def save(ref: ModelRef, directory: Path) -> None:
    saving.save(loading.load_plain(ref.base, torch.float32), ref, directory, train=TrainConfig(), shared=Sharding.none)


def merge(ref: ModelRef, directory: Path) -> None:
    saving.write_plain(ref, directory)


def tensors(directory: Path) -> dict[str, Any]:
    checkpoint = Checkpoint(directory)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("write", [save, merge])
def test_a_model_is_saved_in_shards_of_its_own_size_limit(
    write: Any, tiny: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory in (whole, parts):
        directory.mkdir()
    write(tiny, whole)
    monkeypatch.setattr(saving, "SHARD_BYTES", 300_000)
    write(tiny, parts)
    assert len(list(whole.glob("*.safetensors"))) == 1 < len(list(parts.glob("*.safetensors")))
    expected, found = tensors(whole), tensors(parts)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
