"""Seconds follow from counted work and the speed of a device. The expected values are computed by hand."""

import pytest

from pipeline.config.gpus import GPUS
from pipeline.doctor.speeds import Speed
from pipeline.doctor.work import Work


def test_seconds_are_the_sum_of_arithmetic_memory_and_disk() -> None:
    speed = Speed.of_gpu(GPUS["h100"], "")
    assert speed.seconds(Work(flops=0.3 * 989e12)) == pytest.approx(1)
    assert speed.seconds(Work(fp32_flops=0.3 * 67e12)) == pytest.approx(1)
    assert speed.seconds(Work(memory_bytes=0.5 * 3.35e12, disk_bytes=2e9)) == pytest.approx(3)


def test_the_speed_of_the_cpu_is_measured() -> None:
    found = Speed.of_cpu()
    assert min(found.flops, found.fp32_flops, found.bytes_per_second) > 1e7 and found.capability is None
