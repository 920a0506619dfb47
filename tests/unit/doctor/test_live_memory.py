"""The bytes that fake tensors would occupy on a GPU."""

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from pipeline.doctor.live_memory import LiveMemory


@pytest.fixture
def memory() -> Iterator[LiveMemory]:
    with FakeTensorMode(), LiveMemory() as live:
        yield live


def test_allocations_are_rounded_up_to_512_bytes(memory: LiveMemory) -> None:
    kept = [torch.empty(1, device="cuda"), torch.empty(129, device="cuda")]
    assert memory.live == 512 + 1024
    assert len(kept) == 2


def test_a_view_takes_no_memory_and_keeps_the_storage_alive(memory: LiveMemory) -> None:
    whole = torch.empty(1024, device="cuda")
    part = whole.view(32, 32)
    del whole
    assert memory.live == 4096
    del part
    assert memory.live == 0


def test_tensors_on_the_cpu_are_not_counted(memory: LiveMemory) -> None:
    kept = torch.empty(1024, device="cpu")
    assert memory.live == 0
    assert kept.numel() == 1024


def test_a_resized_storage_counts_with_its_new_size(memory: LiveMemory) -> None:
    gathered = torch.empty(1024, device="cuda")
    gathered.untyped_storage().resize_(0)
    assert memory.live == 0
    gathered.untyped_storage().resize_(4096)
    assert memory.live == 4096


def test_a_tensor_made_of_two_tensors_takes_only_their_memory(memory: LiveMemory) -> None:
    pair = TwoTensor(torch.empty(1024, device="cuda"), torch.empty(1024, device="cuda"))
    copy = pair.clone()
    assert memory.live == 4 * 4096
    del pair
    assert memory.live == 2 * 4096
    assert copy.numel() == 1024


def test_each_phase_has_its_own_peak(memory: LiveMemory) -> None:
    kept = torch.empty(1024, device="cuda")
    with memory.phase("forward"):
        torch.empty(2048, device="cuda")
    with memory.phase("backward"):
        with memory.phase("inner"):
            torch.empty(4096, device="cuda")
        torch.empty(256, device="cuda")
    assert memory.peaks == {"forward": 4096 + 8192, "backward": 4096 + 1024, "inner": 4096 + 16384}
    assert kept.numel() == 1024
