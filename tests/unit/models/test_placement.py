"""Where models are placed, and whether they fit there."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from pipeline.config import Device, Sharding, TinyConfig
from pipeline.doctor.fake_gpu import pretend_cuda
from pipeline.errors import MachineError, UserError
from pipeline.models import loading, placement, tiny_model
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
    model = loading.load_packed(tiny, torch.float32)
    size = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(host_memory, "available_bytes", lambda: size)
    placement.raise_if_host_too_small("evaluate", tiny, torch.float32)
    with pytest.raises(MachineError):
        placement.raise_if_host_too_small("sft", tiny, torch.bfloat16, copies=2)  # packed experts stay as large
    monkeypatch.setattr(host_memory, "available_bytes", lambda: size - 1)
    with pytest.raises(MachineError, match=f"stage=evaluate: loading {tiny} needs .* MB of host memory"):
        placement.raise_if_host_too_small("evaluate", tiny, torch.float32)
    placement.raise_if_host_too_small("sft", tiny, torch.float32, copies=0)


def test_processes_of_one_machine_keep_a_copy_each_or_their_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert placement.copies_in_host_memory(Sharding.none) == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert placement.copies_in_host_memory(Sharding.none) == placement.copies_in_host_memory(Sharding.zero2) == 4
    assert placement.copies_in_host_memory(Sharding.fsdp2) == placement.copies_in_host_memory(Sharding.zero3) == 0.5
    with pretend_cuda(4):
        assert placement.copies_in_host_memory(Sharding.none) == 0


def layer_bytes(model: torch.nn.Module) -> tuple[int, list[int]]:
    layers = [sum(each.nbytes for each in layer.parameters()) for layer in model.get_submodule("model.layers")]
    return sum(each.nbytes for each in model.parameters()) - sum(layers), layers


def test_layers_fill_the_gpus_in_order_and_the_first_gpu_has_everything_else(tiny: Path) -> None:
    model = loading.load_packed(tiny, torch.float32)
    outside, (first, second) = layer_bytes(model)
    others = {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"}

    def spread(*budgets: int) -> list[int] | None:
        found = placement.spread_layers(model, budgets)
        if found is None:
            return None
        assert {found.pop(name) for name in others} == {0}
        assert list(found) == ["model.layers.0", "model.layers.1"]
        return list(found.values())

    assert spread(outside + first + second) == [0, 0]
    assert spread(outside + first, second) == [0, 1]
    assert spread(outside, first - 1, first, second) == [2, 3]
    assert spread(outside + first, second - 1) is None
    assert spread(outside - 1, first + second) is None


@pytest.mark.parametrize(("spread", "part"), [(False, "MB are free. Use"), (True, "and 2 GPUs are too small together")])
def test_a_model_that_fits_no_gpu_stays_on_the_cpu_with_a_warning(
    tiny: Path, capsys: pytest.CaptureFixture[str], spread: bool, part: str
) -> None:
    model = loading.load_packed(tiny, torch.float32)
    needed = 1.3 * sum(parameter.nbytes for parameter in model.parameters())
    with pretend_cuda(2), patch.object(torch.cuda, "mem_get_info", lambda _=0: (int(needed / 4), 10**9)):
        assert placement.place(model, spread).device == torch.device("cpu")
    warning = capsys.readouterr().err
    assert warning.startswith("[loading] warning: the model stays on the CPU") and part in warning


def test_a_model_without_a_gpu_stays_on_the_cpu_and_nothing_is_said(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert placement.place(loading.load_plain(tiny, torch.float32), spread=True).device == torch.device("cpu")
    assert capsys.readouterr() == ("", "")
