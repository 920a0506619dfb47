"""Where models are placed, and whether they fit there."""

from pathlib import Path

import pytest
import torch

from pipeline.config import Device, Sharding, TinyConfig
from pipeline.doctor.fake_gpu import pretend_cuda
from pipeline.errors import MachineError, UserError
from pipeline.models import loading, tiny_model
from pipeline.runs import host_memory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("placement") / "tiny"
    tiny_model.create_tiny(directory, TinyConfig())
    return directory


def test_conversions_use_the_gpu_if_there_is_one() -> None:
    assert loading.device_of(Device.auto) == loading.device_of(Device.cpu) == "cpu"
    with pytest.raises(UserError, match="device=cuda: no GPU is visible here"):
        loading.device_of(Device.cuda)
    with pretend_cuda():
        assert loading.device_of(Device.auto) == loading.device_of(Device.cuda) == "cuda"
        assert loading.device_of(Device.cpu) == "cpu"


def test_a_model_that_does_not_fit_into_host_memory_is_refused_before_it_is_loaded(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loading.load_plain(tiny, torch.float32)
    size = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(host_memory, "available_bytes", lambda: size)
    loading.raise_if_host_too_small("evaluate", tiny, torch.float32)
    loading.raise_if_host_too_small("sft", tiny, torch.bfloat16, copies=2)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: size - 1)
    with pytest.raises(MachineError, match=f"stage=evaluate: loading {tiny} needs .* GB of host memory"):
        loading.raise_if_host_too_small("evaluate", tiny, torch.float32)
    loading.raise_if_host_too_small("sft", tiny, torch.float32, copies=0)


def test_processes_of_one_machine_keep_a_copy_each_or_their_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading.copies_in_host_memory(Sharding.none) == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert loading.copies_in_host_memory(Sharding.none) == loading.copies_in_host_memory(Sharding.zero2) == 4
    assert loading.copies_in_host_memory(Sharding.fsdp2) == loading.copies_in_host_memory(Sharding.zero3) == 0.5
    with pretend_cuda(4):
        assert loading.copies_in_host_memory(Sharding.none) == 0
