"""All stages save checkpoints with the same size limit for weight files, and a save that was killed leaves no trace."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoints.reading import Checkpoint
from pipeline.config import LoraConfig, Sharding, TinyConfig, TrainConfig
from pipeline.models import adapters, loading, saving
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


def test_adapters_are_saved_as_the_same_files_after_a_killed_save(
    tiny: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = TrainConfig(lora=LoraConfig(rank=1))
    model = adapters.attach(loading.load_plain(tiny.base, torch.float32), train, "sft")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        directory.mkdir()
    saving.save(model, tiny, whole, train=train, shared=Sharding.none)

    def half_a_save(directory: str, **_: object) -> None:
        Path(directory).mkdir()
        for name in ("README.md", ".tmpjxDWIo", "adapter_config.json"):
            (Path(directory) / name).write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "save_pretrained", half_a_save)
        saving.save(model, tiny, killed, train=train, shared=Sharding.none)
    saving.save(model, tiny, killed, train=train, shared=Sharding.none)
    assert contents(killed) == contents(whole)


@pytest.mark.filterwarnings("error")
def test_saved_adapters_do_not_look_for_their_base_on_the_hub(
    tiny: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.utils import save_and_load

    train = TrainConfig(lora=LoraConfig(rank=1))
    model = adapters.attach(loading.load_plain(tiny.base, torch.float32), train, "sft")
    model.peft_config["default"].base_model_name_or_path = "base"
    asked: list[str] = []
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda name, *_, **__: asked.append(name))
    monkeypatch.chdir(tmp_path)
    saving.save_adapters(model, tmp_path, tiny.base)
    assert asked == []


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}
