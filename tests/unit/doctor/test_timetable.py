"""The report has the time and the price of a run, and says what they are based on."""

from pipeline.doctor import timetable
from pipeline.doctor.timetable import Timetable
from pipeline.runs.gpus import Gpu


def test_the_price_counts_every_gpu_for_the_whole_time() -> None:
    table = Timetable({"sft": 3600.0, "qat": 1800.0}, "h100", devices=8, price=2.5)
    assert table.cost == 2.5 * 8 * 1.5
    assert dict(table.lines())["cost"] == "estimate: 30.00 for 12.0 GPU hours at 2.5 each"
    assert dict(table.lines())["  together"] == "1 h 30 min on 8 GPUs"
    assert "cost" not in dict(Timetable({"sft": 1.0}, "h100", 1).lines())


def test_an_unknown_gpu_has_no_estimate_unless_another_is_planned_for() -> None:
    unknown = (Gpu("NVIDIA T4", (7, 5), 16 * 10**9),)
    assert timetable.speed_of(None, unknown) is None
    planned = timetable.speed_of("h100", unknown)
    assert planned is not None and planned.flops == 0.3 * 989e12 and planned.capability == (9, 0)
    assert "peak 989 TFLOP/s in BF16, 67 TFLOP/s in FP32, 3.35 TB/s" in planned.name
    measured = timetable.speed_of(None, ())
    assert measured is not None and "CPU (measured here" in measured.name
