"""The memory of GPUs is measured without a CUDA context in this process."""

import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from pipeline.doctor import machine
from pipeline.doctor.fake_gpu import FakeProperties, pretend_cuda
from pipeline.errors import MachineError
from pipeline.runs import gpus
from pipeline.runs.gpus import Gpu


def must_not_be_called(*_: object) -> None:
    raise AssertionError("creates a CUDA context")


def test_the_measurement_covers_every_visible_gpu() -> None:
    with pretend_cuda(3, FakeProperties(total_memory=1000)):
        assert gpus.measure_free_bytes() == [1000, 1000, 1000]


def test_a_failed_measurement_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(MachineError, match="cannot be measured: no message"):
        gpus.free_bytes()


def test_doctor_creates_no_context_and_reports_the_fullest_and_the_smallest_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = (Gpu("large", (9, 0), 80), Gpu("small", (9, 0), 24))
    monkeypatch.setattr(gpus, "visible", lambda: sizes)
    monkeypatch.setattr(gpus, "free_bytes", lambda: [20, 23])
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pretend_cuda(2), patch.object(torch.cuda, "mem_get_info", must_not_be_called):
        found = machine.figures(tmp_path)
    assert (found["gpus"], found["gpu_free_bytes"], found["gpu_total_bytes"]) == (2, 20, 24)
    assert (found["processes"], found["local_processes"]) == (16, 8)
